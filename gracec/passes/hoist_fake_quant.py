"""hoist-fake-quant: quantize weights before the graph runs, once for as many runs as one likes.

    linear(x, fake_quantize(w, w_scale))    ->  linear(x, w_quantized)
    linear(x, scale_codes(codes, w_scale))  ->  linear(x, w_quantized)

`w_quantized` is a parameter beside the weight that holds what the node computed. It is as it was
then: `gracec.training.quantized_weights` computes it again after each optimizer step, and turns the
gradient that it gets into those of weight and scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from gracec.ir.program import Program
from gracec.ir.queries import seen_through
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import SCALE_CODES, drop_dead_tensors
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE

SUFFIX = "_quantized"


@dataclass(frozen=True)
class HoistFakeQuant(Pass):
    """No options."""

    name: ClassVar[str] = "hoist-fake-quant"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        hoisted = any(target.endswith(SUFFIX) for target in program.fqns)
        if not hoisted and not quantized_weights(program):
            raise self.refuse("nothing is fake-quantized", fix="run insert-fake-quant first")

    def apply(self, program: Program) -> PassResult:
        count = hoist(program, compute)
        notes = (f"{count} weights quantized beforehand",)
        return PassResult(program, bool(count), notes if count else ())

    def ensures(self, before: Program, after: Program) -> None:
        if quantized_weights(after):
            raise self.refuse("a weight is still quantized in the graph")


def hoist(program: Program, value_of: Callable[[Program, fx.Node], Tensor]) -> int:
    """Put a parameter in the place of each quantized weight, in a program of one's own; how many.

    Args:
        value_of: what the parameter holds, of the node that computes it now.
    """
    nodes = quantized_weights(program)
    for target, calls in nodes.items():
        weight = seen_through(calls[0])
        program.set_tensor(target, nn.Parameter(value_of(program, calls[0])))
        program.fqns[target] = (program.fqn(str(weight.target)) + SUFFIX,)
        for node in calls:
            with program.graph.inserting_before(node):
                held = program.graph.get_attr(target)
            held.meta = dict(node.meta)
            node.replace_all_uses_with(held)
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code(is_impure_node=_stays)
    drop_dead_tensors(program)
    return len(nodes)


def quantized_weights(program: Program) -> dict[str, list[fx.Node]]:
    """What stands for each quantized weight after `hoist-fake-quant`, as an attribute path -> the
    nodes that compute it now, more than one where its module is called more than once."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target in (FAKE_QUANTIZE, SCALE_CODES):
            found.setdefault(f"{seen_through(node).target}{SUFFIX}", []).append(node)
    return found


@torch.no_grad()
def compute(program: Program, node: fx.Node) -> Tensor:
    """The value of a node that depends on tensors of the program alone."""
    if node.op == "get_attr":
        return program.tensor(str(node.target)).detach()
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: compute(program, one))
    assert callable(node.target)
    found: Tensor = node.target(*args, **kwargs)
    return found


def _stays(node: fx.Node) -> bool:
    """Whether a node without users stays: only views of a weight leave, and what they are of."""
    return node.op not in ("get_attr", "call_function") or seen_through(node).op != "get_attr"
