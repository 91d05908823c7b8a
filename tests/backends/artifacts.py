"""Artifacts for the tests of formats: of a compiled model, or made of random codes in no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from gracec import quant
from gracec.compiled import CompiledModel
from gracec.frozen import Frozen
from gracec.quant import QuantSpec
from gracec.quant.frozen import FrozenWeight
from tests.tiny import tiny_llava, tiny_processor

DECODER = "model.language_model.layers"
ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def artifact_of(compiled: CompiledModel) -> Frozen:
    """What `CompiledModel` hands to a format."""
    return replace(compiled.frozen, name="maker/model")


def decoder_specs(spec: QuantSpec, layers: int = 2) -> dict[str, QuantSpec]:
    """Every linear weight of the decoder with this spec."""
    names = [f"{DECODER}.{layer}.{name}" for layer in range(layers) for name in (*ATTENTION, *MLP)]
    return dict.fromkeys(names, spec)


def random_weight(shape: tuple[int, int], spec: QuantSpec, seed: int) -> FrozenWeight:
    """Codes in the whole range of the spec, scales on the grid, small enough to run a model; half
    of them are negative where the spec is signed."""
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = quant.code_range(spec.bits)
    codes = torch.randint(lowest, highest + 1, shape, generator=generator).to(torch.int8)
    scales = torch.rand(spec.scale_shape(*shape), generator=generator) + 0.5
    scales = quant.round_scale(scales * 0.1 / highest, "bf16")
    if spec.signed:
        scales = torch.where(torch.rand(scales.shape, generator=generator) < 0.5, -scales, scales)
    return FrozenWeight.from_codes(codes, scales, spec)


def random_artifact(
    specs: Mapping[str, QuantSpec],
    *,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    tie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Frozen:
    """The artifact of a tiny model in which the weights of `specs` are random codes."""
    model = tiny_llava(seed, dtype, tie=tie) if model is None else model
    weights = {
        fqn: random_weight(tuple(model.get_parameter(fqn).shape), spec, seed + number)
        for number, (fqn, spec) in enumerate(specs.items())
    }
    processor = processor or tiny_processor()
    return Frozen.of(model, weights, dtype, processor=processor, name="maker/model")


def dense_model(artifact: Frozen, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The plain model whose weights are codes times scales, in the artifact's dtype."""
    dtype = dtype or artifact.dtype
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(artifact.config, dtype=dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in artifact.others.items()}
    tensors |= {fqn: weight.dequantize(dtype) for fqn, weight in artifact.weights.items()}
    found = model.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= set(model.all_tied_weights_keys)
    model.tie_weights()
    return model.eval()


def logits_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Of a batch whose pixels are cast to the dtype of the model."""
    inputs = {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def tokens_of(model: PreTrainedModel, batch: Mapping[str, Tensor], new: int = 6) -> Tensor:
    """Generated greedily."""
    inputs = {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}
    tokens: Tensor = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return tokens
