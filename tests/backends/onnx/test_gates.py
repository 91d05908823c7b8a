from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from gracec.backends.onnx import gates, graphs
from gracec.capture.greedy import Step
from gracec.compiled import CompiledModel
from gracec.errors import GateError
from gracec.kernels import onnxruntime as kernel
from gracec.passes.lower_qdq import LoweredWeight
from gracec.quant import QuantSpec
from tests.backends.artifacts import random_weight

Copied = Callable[[], Path]
DECODER = "decoder_model_merged_q4.onnx"


def lowered(spec: QuantSpec, ops: str, rows: int = 32, columns: int = 256) -> LoweredWeight:
    weight = random_weight((rows, columns), spec, 0)
    operands = kernel.qdq_operands if ops == "qdq" else kernel.matmulnbits_operands
    bits = kernel.kernel_bits(weight, ops)
    return LoweredWeight(*operands(weight), bits, kernel.block_size(weight), rows, columns)


@pytest.mark.parametrize("ops", kernel.OPS)
@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits, 32) for bits in (2, 3, 4, 8)),
        *(QuantSpec(4, size) for size in (16, 64, 128, 256)),
        QuantSpec(4, granularity="per_channel"),
        *(QuantSpec(bits, 32, signed=True) for bits in (2, 3, 4, 8)),
        *(QuantSpec(4, size, signed=True) for size in (16, 128)),
        QuantSpec(4, granularity="per_channel", signed=True),
    ],
    ids=str,
)
def test_every_kernel_against_float64(spec: QuantSpec, ops: str) -> None:
    for rows in (32, 7):
        weights = {"w": lowered(spec, ops, rows)}
        assert gates.matmul_error(weights, ops, "faithful") <= 1e-6
        assert 1e-4 < gates.matmul_error(weights, ops, "fast") <= gates.MATMUL_BOUND["fast"]


def test_rounded_activations_are_not_faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.ACCURACY_LEVEL, "faithful", 4)
    for ops in kernel.OPS:
        with pytest.raises(GateError, match="w: INT4 matmul is off by .* the bound is 1e-05"):
            gates.matmul_error({"w": lowered(QuantSpec(4, 32), ops)}, ops, "faithful")


def test_a_matmul_that_is_not_fused_fails_the_count(exported: Path) -> None:
    path = exported / "onnx" / DECODER
    assert gates.kernels_in_session(path, "qdq", "faithful", {kernel.MATMUL_NBITS: 14}) == 14
    with pytest.raises(GateError, match="14 matmuls run on the INT4 kernel, 15 are planned"):
        gates.kernels_in_session(path, "qdq", "faithful", {kernel.MATMUL_NBITS: 15})
    planned = {kernel.MATMUL_NBITS: 14, kernel.MATMUL_INT8: 1}
    with pytest.raises(GateError, match="0 matmuls run on the INT8 kernel, 1 are planned"):
        gates.kernels_in_session(path, "qdq", "faithful", planned)
    assert not list(path.parent.glob(".optimized*"))


def test_shared_scales_fail_the_count(copied: Copied) -> None:
    """What the count is for: the runtime fuses nothing that is shared."""
    path = copied() / "onnx" / DECODER
    model = onnx.load(str(path))
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    same = next(n for n in nodes[1:] if "q_proj" in n.input[1])
    same.input[1] = nodes[0].input[1]
    onnx.save(model, str(path))
    with pytest.raises(GateError, match="12 matmuls run on the INT4 kernel, 14 are planned"):
        gates.kernels_in_session(path, "qdq", "faithful", {kernel.MATMUL_NBITS: 14})


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [7, 8])
def test_the_int8_kernel_does_not_saturate_as_it_is_written(bits: int, signed: bool) -> None:
    spec = QuantSpec(bits, granularity="per_channel", signed=signed)
    weight = random_weight((32, 256), spec, 0)
    codes, scales = kernel.int8_operands(weight)
    lowered = LoweredWeight(codes, scales, 8, 0, 32, 256)
    assert gates.matmul_error({"w": lowered}, "qdq", "faithful") <= 1e-6


def saturated(bits: int, unsigned: bool | None) -> float:
    """What the int8 kernel makes of 64 products 1 * 1, in the highest codes of both."""
    highest = 2 ** (bits - 1) - 1
    codes = np.full((64, 16), highest, dtype=np.int8)
    scales = np.full(16, 1 / highest, dtype=np.float32)
    x = np.ones((1, 64), dtype=np.float32)
    scale = np.float32(1 / 255)
    found = gates.run_int8(codes, scales, x, scale, np.uint8(0), unsigned)
    return float(found[0, 0])


def test_signed_codes_of_8_bits_are_a_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor saturates, the gate stops what would be wrong; what is written is not."""
    for bits in (7, 8):
        assert saturated(bits, None) == pytest.approx(64, rel=1e-5)
    if saturated(8, unsigned=False) == pytest.approx(64, rel=1e-5):
        pytest.skip("this processor has VNNI, whose int8 kernels do not saturate")
    assert saturated(8, unsigned=False) < 40
    monkeypatch.setattr(graphs, "needs_eight_bits", lambda codes: False)
    weight = random_weight((32, 256), QuantSpec(8, granularity="per_channel"), 0)
    lowered = LoweredWeight(*kernel.int8_operands(weight), 8, 0, 32, 256)
    with pytest.raises(
        GateError, match="w: INT8 matmul is off by .* saturates; quantize .* 7 bits"
    ):
        gates.matmul_error({"w": lowered}, "qdq", "faithful")


def test_codes_are_read_back_by_another_package(exported: Path, compiled: CompiledModel) -> None:
    path = exported / "onnx" / DECODER
    assert gates.stored_weights_are_exact(path, compiled.weights) == 14
    fqn, weight = next(iter(compiled.weights.items()))
    doubled = replace(weight, scales=weight.scales * 2)
    with pytest.raises(GateError, match=f"{fqn} reads back other than codes times scales"):
        gates.stored_weights_are_exact(path, {**compiled.weights, fqn: doubled})


def test_a_file_that_is_not_valid(copied: Copied) -> None:
    path = copied() / "onnx" / "embed_tokens.onnx"
    gates.file_is_valid(path)
    model = onnx.load(str(path), load_external_data=False)
    model.graph.node[0].op_type = "Gathre"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GateError, match=r"embed_tokens\.onnx: not valid ONNX: "):
        gates.file_is_valid(path)


def test_near_ties_are_ambiguous_and_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clear, tie = [0.0, 9.0, 1.0], [0.0, 9.0, 8.99]

    def answers(*rows: list[int], logits: list[list[float]]) -> Any:
        steps = zip(*rows, strict=True)
        return [Step(torch.tensor(step), torch.tensor(logits)) for step in steps]

    expected = answers([1, 1], [1, 1], [1, 1], logits=[clear, tie, clear])
    monkeypatch.setattr(gates, "greedy", lambda *_, **__: expected)
    answered = torch.tensor([[1, 1], [1, 2], [2, 1]])
    agreement = gates.token_agreement(None, {}, answered)  # type: ignore[arg-type]
    assert agreement == gates.TokenAgreement(same=1, ambiguous=1, different=1, tokens=2)


def test_stored_weights_have_the_layout_of_the_model(exported: Path) -> None:
    path = exported / "onnx" / DECODER
    found = dict(gates.stored_weights(path))
    model = onnx.load(str(path))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    fqn = "model.language_model.layers.0.mlp.up_proj.weight"
    assert found[fqn].shape == (128, 64)
    assert stored[f"{fqn}.codes"].data_type == onnx.TensorProto.INT4
    codes = numpy_helper.to_array(stored[f"{fqn}.codes"]).astype(np.float32)
    scales = numpy_helper.to_array(stored[f"{fqn}.scales"])
    assert codes.shape == (64, 128)
    np.testing.assert_array_equal(found[fqn].numpy().T, codes * scales)
