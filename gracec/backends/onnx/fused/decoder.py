"""Make the fused decoder of the decoder of standard operators, and hold it to it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import PreTrainedConfig

from gracec.backends.onnx import gates
from gracec.backends.onnx.fused import FUSED, POSITIONS
from gracec.backends.onnx.fused.attention import MOST_POSITIONS, fuse_attentions
from gracec.backends.onnx.fused.linears import fuse_linears
from gracec.backends.onnx.fused.norm import fuse_norms
from gracec.backends.onnx.session import open_session
from gracec.capture.serving_graph import BATCH, LENGTH, PAST, TOTAL
from gracec.errors import GateError, GracecError
from gracec.kernels.onnxruntime import MATMUL_NBITS
from gracec.quant.frozen import FrozenWeight, by_matrix

FILE = f"{FUSED}.onnx"


@dataclass(frozen=True)
class FusedDecoder:
    """A file that was written.

    Attributes:
        kernels: matmuls on the INT4 kernel.
        note: what was fused.
    """

    path: Path
    kernels: int
    note: str


def write_fused(
    standard: Path,
    config: PreTrainedConfig,
    weights: Mapping[str, FrozenWeight],
    mode: str,
    planned: Mapping[str, int],
) -> FusedDecoder:
    """Write the fused decoder beside the standard one, whose tensors it shares.

    Args:
        weights: FQN -> those that are in codes, which the file is held to.
        mode: of the kernels.
        planned: operator of a kernel -> how often the standard decoder has it.

    Raises:
        GracecError: if this decoder has no such form; nothing is written then.
        GateError: if the file is not what it should be.
    """
    model = ir.load(standard)
    if any(
        value.name == "position_ids" and len(value.shape or ()) > 2 for value in model.graph.inputs
    ):
        raise GracecError("positions are of rows and columns, not counted")
    positions = min(config.get_text_config().max_position_embeddings, MOST_POSITIONS)

    def compute(names: Sequence[str], past: int, length: int) -> list[np.ndarray]:
        return evaluate(standard, names, past, length)

    joined = fuse_linears(model.graph)
    attentions = fuse_attentions(model.graph, compute, positions)
    norms = fuse_norms(model.graph)
    _drop_unused(model)
    model.graph.name = FUSED
    model.metadata_props[POSITIONS] = str(positions)
    path = standard.with_name(FILE)
    ir.save(model, path)
    path.chmod(0o644)
    gates.file_is_valid(path)
    saved = sum(len(parts) - 1 for parts in joined.values())
    planned = {**planned, MATMUL_NBITS: planned[MATMUL_NBITS] - saved}
    kernels = gates.kernels_in_session(path, "matmulnbits", mode, planned)
    _parts_are_exact(path, joined, weights)
    note = (
        f"{len(joined)} groups of linears, {attentions} attentions, {norms} norms after additions"
    )
    return FusedDecoder(path, kernels, note)


def evaluate(path: Path, names: Sequence[str], past: int, length: int) -> list[np.ndarray]:
    """What values of a decoder are for S tokens of one prompt after a cache of P.

    Args:
        names: of values that depend on no weight: the mask, cosines and sines.
    """
    model = ir.load(path)
    graph = model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    found = [ir.node("Cast", [values[name]], {"to": ir.DataType.FLOAT}) for name in names]
    graph.extend(found)
    for node in found:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = [node.outputs[0] for node in found]
    _drop_unused(model)
    ir.external_data.load_to_model(model)
    feed = {
        value.name: _example(value, past, length)
        for value in graph.inputs
        if value.name is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.onnx"
        ir.save(model, file)
        return list(open_session(file, {}, threads=1).run(None, feed))


def _example(value: ir.Value, past: int, length: int) -> np.ndarray:
    """An input for S tokens of one prompt after a cache of P; positions are counted."""
    sizes = {BATCH: 1, LENGTH: length, PAST: past, TOTAL: past + length}
    assert value.shape is not None and value.dtype is not None
    shape = [sizes[str(size)] if not isinstance(size, int) else size for size in value.shape]
    if value.name == "position_ids":
        return np.broadcast_to(np.arange(past, past + length), shape).copy()
    kind = value.dtype.numpy()
    return np.ones(shape, kind) if value.name == "attention_mask" else np.zeros(shape, kind)


def _drop_unused(model: ir.Model) -> None:
    """Nodes, tensors and inputs that no output depends on."""
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]


def _parts_are_exact(
    path: Path, joined: Mapping[str, Sequence[str]], weights: Mapping[str, FrozenWeight]
) -> None:
    """Gate: every weight of the file is codes times scales, bit for bit, those joined by parts."""
    exact = {name: one for fqn, w in weights.items() for name, one in by_matrix(fqn, w).items()}
    for name, dense in gates.stored_weights(path):
        start = 0
        for fqn in joined.get(name, (name,)):
            part = exact[fqn].dequantize() if fqn in exact else None
            rows = 0 if part is None else len(part)
            if part is None or not torch.equal(dense[start : start + rows], part):
                raise GateError(f"{fqn} reads back other than codes times scales", where=path.name)
            start += rows
        if start != len(dense):
            raise GateError(f"{name} has {len(dense)} rows, its parts {start}", where=path.name)
