"""return-head: return what goes into the head, and its weight, in the place of logits.

    return logits [S, V], hidden            logits = after(linear(x, w, b))
    ->  return head_input [S, d], head [V, d], [head_bias [V],] hidden

Whoever runs the graph computes the logits, a few at a time (`gracec.objective.LazyLogits`): with a
vocabulary of 150,000 they are the largest tensor of a training step. The weight is returned as the
graph computes it, fake-quantized or shared with the embedding, so that gradients reach it through
the graph. What follows the head element by element, a soft-cap or a scale, is written down on the
returned weight (`follows`), and `following` reads it. A head that is followed by something else
keeps its logits; a note says so, and in strict mode an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gracec.ir.program import Program, annotate, annotation
from gracec.passes.base import Pass, PassResult
from gracec.quant.ops import dtype_name

aten = torch.ops.aten
HEAD_INPUT, HEAD, HEAD_BIAS = "head_input", "head", "head_bias"
LOGITS = "logits"

Step = list[Any]
"""What is done to each logit: a name of `_STEPS`, and the operand if it has one. JSON-able."""

_STEPS: dict[str, Callable[..., Tensor]] = {
    "div": torch.div,
    "mul": torch.mul,
    "tanh": torch.tanh,
    "to": lambda x, dtype: x.to(getattr(torch, dtype)),
}
_WITH_A_NUMBER = {aten.div.Tensor: "div", aten.mul.Tensor: "mul"}
_CASTS = {aten.to.dtype, aten._to_copy.default}


@dataclass(frozen=True)
class ReturnHead(Pass):
    """Options: `strict`, whether logits that have to stay are an error."""

    strict: bool = False
    name: ClassVar[str] = "return-head"
    keeps_numerics: ClassVar[bool] = False  # the logits are no output any more

    def requires(self, program: Program) -> None:
        if HEAD in program.output_names:
            return
        if not any(program.nodes(part="head")):
            raise self.refuse("the head is unknown", fix="run analyze-modality first")

    def apply(self, program: Program) -> PassResult:
        if HEAD in program.output_names:
            return PassResult(program, False)
        found = _found(program)
        if isinstance(found, str):
            if self.strict:
                raise self.refuse(f"{found}, so that logits are computed as a whole")
            return PassResult(program, False, (f"logits are computed as a whole: {found}",))
        head, steps = found
        operands = dict(zip((HEAD_INPUT, HEAD, HEAD_BIAS), head.args, strict=False))
        outputs = {name: node for name, node in operands.items() if isinstance(node, fx.Node)}
        for name in outputs.keys() - {HEAD_INPUT}:
            outputs[name] = _alias(program, head, outputs[name])
        if steps:
            annotate(outputs[HEAD], follows=steps)
        node = program.outputs[LOGITS]
        others = {name: one for name, one in program.outputs.items() if name != LOGITS}
        program.set_outputs(outputs | others)
        while not node.users:
            before = node.all_input_nodes[0]
            program.graph.erase_node(node)
            if node is head:
                break
            node = before
        return PassResult(program, True, ("the head is returned, and no logits",))

    def ensures(self, before: Program, after: Program) -> None:
        if (LOGITS in after.output_names) == (HEAD in after.output_names):
            raise self.refuse("either the head is returned or the logits are")


def following(program: Program) -> Callable[[Tensor], Tensor] | None:
    """What follows the head that a program returns; None where nothing does."""
    steps: list[Step] = annotation(program.outputs[HEAD]).get("follows", [])
    if not steps:
        return None

    def after(logits: Tensor) -> Tensor:
        for name, *operand in steps:
            logits = _STEPS[name](logits, *operand)
        return logits

    return after


def _found(program: Program) -> tuple[fx.Node, list[Step]] | str:
    """The head and what follows it, or why it cannot be left to others."""
    steps: list[Step] = []
    node = program.outputs[LOGITS]
    while annotation(node).get("part") != "head":
        step = _step(node)
        if step is None:
            return f"{node.target} follows the head"
        steps.insert(0, step)
        node = node.all_input_nodes[0]
    if node.target != aten.linear.default:
        return f"the head is {node.target}"
    return node, steps


def _step(node: fx.Node) -> Step | None:
    """What a node does to each logit; None for one that does something else."""
    if node.args[:1] != tuple(node.all_input_nodes):
        return None
    if node.target in _CASTS:
        return ["to", dtype_name(node.meta["val"].dtype)]
    if node.target == aten.tanh.default:
        return ["tanh"]
    if node.target in _WITH_A_NUMBER and isinstance(node.args[1], (int, float)):
        return [_WITH_A_NUMBER[node.target], node.args[1]]
    return None


def _alias(program: Program, head: fx.Node, operand: fx.Node) -> fx.Node:
    """A node of the head's that returns an operand of it, and knows what the head knew: its part,
    and how it is quantized."""
    with program.graph.inserting_before(head):
        alias = program.graph.call_function(aten.alias.default, (operand,))
    alias.meta = {**head.meta, "val": operand.meta["val"]}
    annotate(alias, role=None)
    return alias
