"""From a frozen graph to a checked ONNX file: the one way in which graphs are written.

lower-qdq, further passes  ->  torch.onnx  ->  file  ->  valid, kernels as planned, exact codes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from gracec.backends.onnx import gates, graphs
from gracec.capture.serving import ServingProgram
from gracec.errors import GateError
from gracec.journal import Note
from gracec.passes.base import Pass, run_passes
from gracec.passes.freeze import frozen_weights
from gracec.passes.lower_qdq import LoweredWeight, LowerQdq, lowered_weights
from gracec.passes.pipeline import Pipeline


@dataclass(frozen=True)
class WrittenGraph:
    """A graph on disk.

    Attributes:
        files: the graph, then the file with its large tensors, if there is one.
        lowered: FQN -> every weight that runs on an integer kernel.
        kernels: how many such kernels the runtime makes of it.
        equal_weights: weights that read back as codes times scales, bit for bit.
        notes: of the passes.
    """

    files: tuple[Path, ...]
    lowered: Mapping[str, LoweredWeight]
    kernels: int
    equal_weights: int
    notes: tuple[Note, ...]


def write_graph(
    graph: ServingProgram,
    name: str,
    path: Callable[[Set[str]], Path],
    *,
    ops: str,
    mode: str,
    strict: bool,
    further: Sequence[Pass] = (),
    place: Callable[[Pipeline], Pipeline] = lambda pipeline: pipeline,
    external: bool = False,
    decompose: bool = False,
    arrange: Callable[[ir.Graph], None] = lambda graph: None,
) -> WrittenGraph:
    """Lower a frozen graph, write it and check what was written.

    Args:
        name: of the graph, in the file and in errors.
        path: kinds of kernels that it runs on -> the file to write.
        ops, mode, strict: options of lower-qdq.
        further: passes after it.
        place: puts passes of others into the pipeline.
        external, decompose: of `graphs.write_model` and `graphs.to_onnx`.
        arrange: puts the tensors in order before they are written.

    Raises:
        GracecError: if the graph cannot be lowered or translated.
        GateError: if the file is not what it should be.
    """
    frozen = frozen_weights(graph.program)
    lowering = [LowerQdq(ops, mode, strict)] if frozen else []
    result = run_passes(graph.program, place(Pipeline((*lowering, *further))))
    lowered = lowered_weights(result.program)
    model = graphs.to_onnx(replace(graph, program=result.program), name, decompose=decompose)
    arrange(model.graph)
    file = path({weight.kernel for weight in lowered.values()})
    files = graphs.write_model(model, file, external=external)
    gates.file_is_valid(file)
    planned = Counter(weight.kernel for weight in lowered.values())
    kernels = gates.kernels_in_session(file, ops, mode, planned)
    exact = gates.stored_weights_are_exact(file, frozen)
    if exact < len(lowered):
        raise GateError(f"not all of {len(lowered)} quantized weights read back", where=name)
    return WrittenGraph(tuple(files), lowered, kernels, exact, result.notes)
