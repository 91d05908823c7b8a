"""Gates on exported graphs: each returns the figure it found, or raises `GateError`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from gracec.backends.onnx import graphs
from gracec.backends.onnx.session import open_session, session_options
from gracec.backends.onnx.translate import KERNEL_DOMAIN
from gracec.capture.greedy import Runtime, Step, greedy
from gracec.errors import GateError
from gracec.gates import NEAR_TIE, LogitAgreement
from gracec.kernels import onnxruntime as kernel
from gracec.kernels.onnxruntime import ACCURACY_LEVEL, OPSET
from gracec.passes.lower_qdq import LoweredWeight
from gracec.quant.frozen import FrozenWeight, by_matrix

MATMUL_BOUND = {"faithful": 1e-5, "fast": 2e-2}
ROUNDED_KL = 0.1
"""Nats that 8-bit activations may cost; more is no rounding any more."""


def file_is_valid(path: Path) -> None:
    """The file, its tensors and its shapes are valid ONNX."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise GateError(f"not valid ONNX: {reason}", where=path.name) from error


def kernels_in_session(path: Path, ops: str, mode: str, planned: Mapping[str, int]) -> int:
    """Count of kernels in the graph that the runtime makes of it; it must be as planned.

    Args:
        planned: operator of a kernel -> how often it has to be there; 0 for those left out.
    """
    with tempfile.TemporaryDirectory(prefix=".optimized.", dir=path.parent) as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, session_options(ops, mode), threads=1, optimized=optimized)
        graph = onnx.load(str(optimized), load_external_data=False).graph
    for kind, name in ((kernel.MATMUL_NBITS, "INT4"), (kernel.MATMUL_INT8, "INT8")):
        count = sum(node.op_type == kind for node in graph.node)
        if count != planned.get(kind, 0):
            raise GateError(
                f"{count} matmuls run on the {name} kernel, {planned.get(kind, 0)} are planned",
                where=path.name,
            )
    return sum(planned.values())


def stored_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """FQN and dense weight [N, K] of every quantized weight of a file, as the onnx package reads
    its codes."""
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            if node.inputs[0] is None or node.inputs[0].const_value is None:
                continue  # an activation
            codes, scales, *zeros = (_array(value) for value in node.inputs)
            if zeros:
                codes = codes.astype(np.int32) - zeros[0]
            if "block_size" in node.attributes:
                scales = np.repeat(scales, node.attributes["block_size"].as_int(), axis=0)
            weight = (codes * scales).T
        elif node.op_type == kernel.MATMUL_NBITS:
            codes, scales = (_array(value) for value in node.inputs[1:3])
            bits = node.attributes["bits"].as_int()
            parts = [(codes.astype(np.int32) >> shift) % 2**bits for shift in range(0, 8, bits)]
            codes = np.stack(parts, axis=-1).reshape(*scales.shape, -1) - 2 ** (bits - 1)
            weight = (codes * scales[..., None]).reshape(len(scales), -1)
        else:
            continue
        (operand,) = (v for v in node.inputs if v is not None and str(v.name).endswith(".codes"))
        fqn = str(operand.name).removesuffix(".codes")
        yield fqn, torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))


def stored_weights_are_exact(path: Path, weights: Mapping[str, FrozenWeight]) -> int:
    """Every quantized weight of a file is codes times scales, bit for bit; how many there are."""
    count = 0
    exact = {name: one for fqn, w in weights.items() for name, one in by_matrix(fqn, w).items()}
    for fqn, found in stored_weights(path):
        if fqn not in exact or not torch.equal(found, exact[fqn].dequantize()):
            raise GateError(f"{fqn} reads back other than codes times scales", where=path.name)
        count += 1
    return count


def matmul_error(weights: Mapping[str, LoweredWeight], ops: str, mode: str) -> float:
    """Largest relative error against float64 of a kernel, over all shapes of weights.

    The first weight of each shape is run on 8 random activations, alone in a graph of the same
    operators; the error is relative to the largest output. The int8 kernel is also run on the
    activations and codes that are most likely to saturate it.
    """
    worst, seen = 0.0, set()
    rng = np.random.default_rng(0)
    for fqn, weight in weights.items():
        shape = (weight.rows, weight.columns, weight.block_size, weight.bits)
        if shape in seen:
            continue
        seen.add(shape)
        if weight.kernel == kernel.MATMUL_INT8:
            worst = max(worst, _int8_error(fqn, weight))
            continue
        x = rng.standard_normal((8, weight.columns), dtype=np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "matmul.onnx"
            onnx.save(_matmul_model(weight, ops, mode), str(path))
            ((_, dense),) = stored_weights(path)
            session = open_session(path, session_options(ops, mode), threads=1)
            (found,) = session.run(None, {"x": x})
        exact = x.astype(np.float64) @ dense.double().numpy().T
        error = relative_error(found, exact)
        if not error <= MATMUL_BOUND[mode]:
            raise GateError(
                f"INT4 matmul is off by {error:.3g} relative to float64, "
                f"the bound is {MATMUL_BOUND[mode]:.0e}",
                where=fqn,
            )
        worst = max(worst, error)
    return worst


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest output."""
    return float(np.abs(found - exact).max() / max(np.abs(exact).max(), 1e-30))


def rounding_is_small(found: LogitAgreement, fix: str = "use mode faithful") -> None:
    """Fast kernels are off by what 8-bit activations cost, not by more."""
    if not found.kl <= ROUNDED_KL:
        raise GateError(
            f"the logits are off by KL {found.kl:.3g}, the bound for 8-bit activations is "
            f"{ROUNDED_KL}",
            fix=fix,
        )


def _int8_error(fqn: str, weight: LoweredWeight) -> float:
    """Largest relative error of the int8 kernel against float64, which has to be one of rounding.

    With the codes as they are, and with the lowest and the highest ones in their place; on random
    activations, and on the lowest and highest of the grid.
    """
    scale, zero_point = np.float32(2**-5), np.uint8(120)
    lowest, highest = -scale * np.float32(zero_point), scale * np.float32(255 - zero_point)
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.uniform(lowest, highest, (8, weight.columns)),
            np.full((1, weight.columns), highest),
            np.full((1, weight.columns), lowest),
        ]
    ).astype(np.float32)
    rounded = np.rint(x / scale).astype(np.float64) * scale
    codes = weight.codes.numpy()
    extremes = np.empty_like(codes)
    extremes[:, ::2], extremes[:, 1::2] = codes.max(), codes.min()
    worst = 0.0
    for tried in (codes, extremes):
        found = run_int8(tried, weight.scales.numpy(), x, scale, zero_point)
        exact = rounded @ (tried * weight.scales.numpy().astype(np.float64))
        error = relative_error(found, exact)
        if not error <= MATMUL_BOUND["faithful"]:
            raise GateError(
                f"INT8 matmul is off by {error:.3g} relative to float64: the kernel saturates",
                where=fqn,
                fix="quantize the weights to 7 bits",
            )
        worst = max(worst, error)
    return worst


def run_int8(
    codes: np.ndarray,
    scales: np.ndarray,
    x: np.ndarray,
    scale: np.floating,
    zero_point: np.integer,
    unsigned: bool | None = None,
) -> np.ndarray:
    """Run the int8 kernel alone, on operators such as `graphs` writes.

    Args:
        codes: int8 [K, N].
        scales: float32 [N].
        x: float32 [M, K], with its scale and zero point.
        unsigned: store codes with the zero point 128; by default where they need 8 bits.

    Returns:
        float32 [M, N].
    """
    if unsigned is None:
        unsigned = graphs.needs_eight_bits(codes)
    stored, zeros = graphs.unsigned_codes(codes) if unsigned else (codes, np.zeros_like(codes[0]))
    tensors = {
        "x.scale": np.asarray(scale),
        "x.zero_point": np.asarray(zero_point),
        "w.codes": stored,
        "w.scales": scales,
        "w.zero_points": zeros,
    }
    grid, weight = ["x.scale", "x.zero_point"], ["w.codes", "w.scales", "w.zero_points"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["x.codes"]),
        helper.make_node("DequantizeLinear", ["x.codes", *grid], ["x.rounded"]),
        helper.make_node("DequantizeLinear", weight, ["w"], axis=1),
        helper.make_node("MatMul", ["x.rounded", "w"], ["y"]),
    ]
    ends = (("x", len(codes)), ("y", codes.shape[1]))
    model = _model(nodes, ends, [numpy_helper.from_array(t, n) for n, t in tensors.items()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matmul.onnx"
        onnx.save(model, str(path))
        kernels_in_session(path, "qdq", "faithful", {kernel.MATMUL_INT8: 1})
        (found,) = open_session(path, {}, threads=1).run(None, {"x": x})
    return np.asarray(found)


def _matmul_model(weight: LoweredWeight, ops: str, mode: str) -> onnx.ModelProto:
    codes = weight.codes.contiguous().numpy()
    operands = [numpy_helper.from_array(weight.scales.contiguous().numpy(), "w.scales")]
    if ops == "qdq":
        kind = TensorProto.INT8 if weight.bits == 8 else TensorProto.INT4
        shape = (weight.columns, weight.rows)
        stored = helper.make_tensor("w.codes", kind, shape, codes.tobytes(), raw=True)
        nodes = [
            helper.make_node(
                "DequantizeLinear",
                ["w.codes", "w.scales"],
                ["w"],
                axis=0,
                block_size=weight.block_size,
            ),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    else:
        stored = numpy_helper.from_array(codes, "w.codes")
        matmul = helper.make_node(
            kernel.MATMUL_NBITS,
            ["x", "w.codes", "w.scales"],
            ["y"],
            domain=KERNEL_DOMAIN,
            K=weight.columns,
            N=weight.rows,
            bits=weight.bits,
            block_size=weight.block_size,
            accuracy_level=ACCURACY_LEVEL[mode],
        )
        nodes = [matmul]
    ends = (("x", weight.columns), ("y", weight.rows))
    return _model(nodes, ends, [stored, *operands])


def _model(
    nodes: list[onnx.NodeProto],
    ends: tuple[tuple[str, int], tuple[str, int]],
    tensors: list[TensorProto],
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", size]) for n, size in ends)
    graph = helper.make_graph(nodes, "matmul", [x], [y], tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(KERNEL_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@dataclass(frozen=True)
class TokenAgreement:
    """Greedy answers beside those of a reference, by prompt.

    Attributes:
        same: answers that are equal to their end.
        ambiguous: that first differ where the reference is a near-tie, which rounding may decide.
        different: that first differ where it is not.
        tokens: length of the longest answer.
    """

    same: int
    ambiguous: int
    different: int
    tokens: int


def token_agreement(
    reference: Runtime, inputs: Mapping[str, Tensor], answered: Tensor
) -> TokenAgreement:
    """Compare greedy answers with those of a reference, which a loop of our own generates.

    Args:
        inputs: prepared ones of the prompts.
        answered: int64 [B, T], the new tokens; none ends an answer.
    """
    with torch.no_grad():
        steps = list(greedy(reference, inputs, max_new_tokens=answered.shape[1]))
    return answers_agree(steps, answered)


def answers_agree(steps: Sequence[Step], answered: Tensor) -> TokenAgreement:
    """Compare tokens [B, T] with the T steps that a reference took; see `token_agreement`."""
    expected = torch.stack([step.tokens for step in steps], dim=1)
    verdicts = {"same": 0, "ambiguous": 0, "different": 0}
    for row, differs in enumerate((expected != answered).tolist()):
        if not any(differs):
            verdicts["same"] += 1
            continue
        logits = steps[differs.index(True)].logits[row].double()
        best, second = logits.topk(2).values
        tie = best - second <= NEAR_TIE * (logits.max() - logits.min())
        verdicts["ambiguous" if tie else "different"] += 1
    return TokenAgreement(**verdicts, tokens=answered.shape[1])


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    array = value.const_value.numpy()
    return array.astype(np.int8) if value.const_value.dtype == ir.DataType.INT4 else array
