"""Packing and unpacking for arbitrary shapes, widths and mixtures; kernels against float64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from gracec.backends import awq
from gracec.backends.base import Format, parse_formats
from gracec.backends.huggingface import per_channel_scales
from gracec.backends.torchao import intx
from gracec.frozen import Frozen
from gracec.kernels import torchao
from gracec.quant import SUPPORTED_BITS, QuantSpec, pack_nibbles, unpack_nibbles
from gracec.quant.frozen import FrozenWeight
from tests.backends.artifacts import (
    decoder_specs,
    random_artifact,
    random_weight,
)
from tests.backends.test_awq import float64_weight
from tests.tiny import tiny_llava

GRANULARITIES = ("per_group", "per_channel", "per_tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**31)


@st.composite
def weights(
    draw: st.DrawFn,
    bits: tuple[int, ...] = SUPPORTED_BITS,
    groups: tuple[int, ...] = (16, 32, 64, 128),
    granularities: tuple[str, ...] = GRANULARITIES,
    rows_of: int = 1,
    most_rows: int = 24,
) -> FrozenWeight:
    group = draw(st.sampled_from(groups))
    spec = QuantSpec(
        draw(st.sampled_from(bits)),
        group,
        granularity=draw(st.sampled_from(granularities)),
        signed=draw(st.booleans()),
    )
    shape = rows_of * draw(st.integers(1, most_rows)), group * draw(st.integers(1, 4))
    return random_weight(shape, spec, draw(SEEDS))


@settings(deadline=None)
@given(weight=weights(bits=(2, 3, 4)))
def test_canonical_nibbles(weight: FrozenWeight) -> None:
    packed = pack_nibbles(weight.codes)
    assert packed.numel() * 2 == weight.codes.numel()
    assert torch.equal(unpack_nibbles(packed), weight.codes)


@settings(deadline=None)
@given(weight=weights(), dtype=st.sampled_from(DTYPES))
def test_compressed_tensors(weight: FrozenWeight, dtype: torch.dtype) -> None:
    bits = weight.spec.storage_bits
    packed = pack_to_int32(weight.codes, bits)
    assert packed.shape[1] * 32 == weight.shape[1] * bits
    assert torch.equal(unpack_from_int32(packed, bits, weight.shape), weight.codes)
    grouped = weight.spec.granularity == "per_group"
    arguments = QuantizationArgs(
        num_bits=bits,
        strategy="group" if grouped else "channel",
        group_size=weight.group_size if grouped else None,
    )
    state = {
        "weight_packed": packed,
        "weight_scale": per_channel_scales(weight).to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(found, weight.dequantize(dtype))


@settings(deadline=None)
@given(weight=weights(), dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=SEEDS)
def test_torchao_intx(weight: FrozenWeight, dtype: torch.dtype, bias: bool, seed: int) -> None:
    artifact = random_artifact({}, model=LLAVA, dtype=dtype)
    flat, metadata = flatten_tensor_state_dict({"x.weight": intx(weight, artifact)})
    found = unflatten_tensor_state_dict(flat, metadata)[0]["x.weight"]
    dense = weight.dequantize(dtype)
    assert torch.equal(found.dequantize(), dense)
    x, offset = random_inputs(weight, 3, bias, dtype, seed)
    linear = torch.nn.functional.linear
    assert torch.equal(linear(x, found, offset), linear(x, dense, offset))


@settings(deadline=None, max_examples=15)
@given(weight=weights((2, 3, 4), awq.GROUP_SIZES, ("per_group",), rows_of=8, most_rows=3))
def test_awq(weight: FrozenWeight) -> None:
    scales = weight.scales.half().t()
    stored = {
        "x.qweight": awq.pack(weight.codes.t()),
        "x.qzeros": awq.pack(torch.zeros_like(scales, dtype=torch.int8)),
        "x.scales": scales,
    }
    assert stored["x.qweight"].numel() * 8 == weight.codes.numel()
    found = float64_weight(stored, "x", weight.group_size)
    assert torch.equal(found, weight.dequantize().double())


@settings(deadline=None, max_examples=60)
@given(
    weight=weights((4,), torchao.GROUP_SIZES, ("per_group",), rows_of=16),
    tokens=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=SEEDS,
)
def test_the_torchao_kernel_agrees_with_float64(
    weight: FrozenWeight, tokens: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    packed = torchao.pack(weight.codes, weight.scales, weight.group_size, dtype)
    x, offset = random_inputs(weight, tokens, bias, dtype, seed)
    found = torch.nn.functional.linear(x, packed, offset).double()
    products = x.double() @ weight.dequantize().double().t()
    exact = products if offset is None else products + offset.double()
    # Rounding is relative to the terms of the sum, which may cancel.
    terms = x.double().abs() @ weight.dequantize().double().abs().t()
    terms = terms if offset is None else terms + offset.double().abs()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert ((found - exact).abs() <= bound * terms + 1e-12).all()


def random_inputs(
    weight: FrozenWeight, tokens: int, bias: bool, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Activations [tokens, K] and a bias [N] or None."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    return x, torch.randn(rows, generator=generator).to(dtype) if bias else None


LLAVA = tiny_llava()
SPECS = st.builds(
    QuantSpec,
    bits=st.sampled_from(SUPPORTED_BITS),
    group_size=st.sampled_from((16, 32, 64)),
    granularity=st.sampled_from(GRANULARITIES),
    signed=st.booleans(),
)
LINEAR = sorted(
    {
        f"{name}.weight"
        for name, module in LLAVA.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
)


@st.composite
def artifacts(draw: st.DrawFn, uniform: bool = False) -> Frozen:
    """Any linear weights of a model, each with a spec of its own; the tower's have a bias."""
    tie, seed = draw(st.booleans()), draw(st.integers(0, 1000))
    if uniform:
        group = draw(st.sampled_from((32, 64)))
        chosen = draw(st.sets(st.sampled_from(sorted(decoder_specs(QuantSpec()))), min_size=1))
        spec = QuantSpec(4, group, signed=draw(st.booleans()))
        return random_artifact(dict.fromkeys(sorted(chosen), spec), tie=tie, seed=seed)
    names = [name for name in LINEAR if not (tie and name == "lm_head.weight")]
    chosen = draw(st.sets(st.sampled_from(names), min_size=1))
    fitting = {
        name: spec
        if LLAVA.get_parameter(name).shape[1] % spec.group_size == 0
        else QuantSpec(4, 16)
        for name, spec in ((name, draw(SPECS)) for name in sorted(chosen))
    }
    return random_artifact(fitting, tie=tie, dtype=draw(st.sampled_from(DTYPES)), seed=seed)


def check(form: Format, artifact: Frozen) -> None:
    """What is written reads back, and only what was quantized is quantized."""
    assert form.refusal(artifact) == ""
    with tempfile.TemporaryDirectory() as directory:
        form.write(artifact, Path(directory))
        found = form.read_weights(Path(directory))
    assert set(found) == set(artifact.weights)
    for fqn, weight in artifact.weights.items():
        assert torch.equal(found[fqn], weight.dequantize(form.dtype(artifact)))


@pytest.mark.parametrize("examples", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["hf", "torchao", "awq"])
def test_any_mixture_is_written_and_read(name: str, examples: int) -> None:
    (form,) = parse_formats(name)

    @settings(deadline=None, max_examples=examples)
    @given(artifact=artifacts(uniform=name == "awq"))
    def holds(artifact: Frozen) -> None:
        check(form, artifact)

    holds()
