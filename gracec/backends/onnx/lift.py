"""A graph as `torch.onnx` takes it, without tracing it again.

`torch.export` would trace the whole graph anew, and `torch.onnx` once more to decompose it. Neither
changes anything here: the graph is flat already, and every operator in it has a translation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from gracec.ir.program import Program

aten = torch.ops.aten
CASTS = {aten.to.device, aten.to.dtype, aten.to.dtype_layout}
CAST = torch.ops.prims.convert_element_type.default
SYNONYMS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}
"""What the translation knows by another name."""


class LiftedProgram(ExportedProgram):
    """A graph whose tensors are inputs, decomposed as far as the translation needs."""

    def run_decompositions(self, *_: Any, **__: Any) -> LiftedProgram:
        return self


def lift(program: Program) -> LiftedProgram:
    """The graph of a program with its tensors as inputs, which it shares."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    tensors: dict[str, Tensor] = {}
    inputs: list[InputSpec] = []
    placeholders: dict[str, fx.Node] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target not in placeholders:
            tensors[target] = tensor = program.tensor(target)
            placeholders[target] = graph.placeholder(f"tensor_{len(placeholders)}")
            placeholders[target].meta = dict(node.meta)
            learnt = isinstance(tensor, nn.Parameter)
            inputs.append(
                InputSpec(
                    InputKind.PARAMETER if learnt else InputKind.BUFFER,
                    TensorArgument(placeholders[target].name),
                    target,
                    persistent=None if learnt else True,
                )
            )
        copied[node] = placeholders[target]
    results = graph.graph_copy(program.graph, copied)
    assert isinstance(results, (tuple, list))
    graph.output(tuple(results))
    _rename(graph)
    given = [copied[node] for node in program.graph.find_nodes(op="placeholder")]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in given]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
        for node in graph.output_node().all_input_nodes
    ]
    signature = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure(((), program.example_inputs)),
        out_spec=pytree.tree_structure((0,) * len(outputs)),
    )
    return LiftedProgram(
        root=fx.GraphModule(nn.Module(), graph),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=tensors,
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", signature)],
        example_inputs=((), dict(program.example_inputs)),
    )


def _rename(graph: fx.Graph) -> None:
    """Operators by names that have a translation; to a file a device means nothing."""
    for node in graph.nodes:
        if node.target in CASTS:
            node.target = CAST
            node.args, node.kwargs = (node.args[0], node.meta["val"].dtype), {}
        node.target = SYNONYMS.get(node.target, node.target)
