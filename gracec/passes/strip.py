"""strip: leave only what computes the logits.

    return logits, hidden -> return logits;  dead nodes, guards and their tensors leave

Blocks that no output depends on (LLaVA takes its features before the last block of the tower) go
with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gracec.ir.program import Program, annotate, drop_assertions
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import drop_dead_tensors


@dataclass(frozen=True)
class Strip(Pass):
    name: ClassVar[str] = "strip"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if "logits" not in program.output_names:
            raise self.refuse("there is no output named 'logits'")

    def apply(self, program: Program) -> PassResult:
        nodes, tensors = len(program.graph.nodes), len(program.fqns)
        taps = [name for name in program.output_names if name != "logits"]
        if taps:
            for node in program.graph.nodes:
                annotate(node, tap=None)
            program.set_outputs({"logits": program.outputs["logits"]})
        drop_dead(program)
        nodes -= len(program.graph.nodes)
        tensors -= len(program.fqns)
        modified = bool(taps or nodes or tensors)
        notes = (f"{len(taps)} taps, {nodes} nodes and {tensors} tensors removed",)
        return PassResult(program, modified, notes if modified else ())

    def ensures(self, before: Program, after: Program) -> None:
        if after.output_names != ("logits",):
            raise self.refuse(f"the outputs are {after.output_names}")
        unread = (n for n in after.graph.nodes if not n.users and n.op == "call_function")
        dead = [node for node in unread if not _has_effect(node)]
        if dead:
            raise self.refuse(f"{dead[0].name} ({dead[0].target}) is left and used by nothing")


def drop_dead(program: Program) -> None:
    """Erase, in place, guards and everything that no output depends on."""
    drop_assertions(program.graph_module)
    program.graph.eliminate_dead_code(is_impure_node=_has_effect)
    drop_dead_tensors(program)
    program.recompile()


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does more than compute its value.

    torch counts attention as impure, since it may draw dropout; in eval mode it draws none.
    """
    if node.op == "call_function":
        return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))
    return node.op != "get_attr"
