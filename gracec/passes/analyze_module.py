"""analyze-module: find the weights of a model that is no vision-language model.

Every matmul and convolution with a weight is of the part `module`; those that read the same
activation are one `fused_set`, and what decides on experts is a `router`, as in analyze-modality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gracec.ir.annotations import Part
from gracec.ir.program import Program, annotate
from gracec.ir.queries import MATMULS, activation_of, chooses_experts, weight_of
from gracec.passes.base import Pass, PassResult


@dataclass(frozen=True)
class AnalyzeModule(Pass):
    """No options."""

    name: ClassVar[str] = "analyze-module"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        sets: dict[fx.Node, int] = {}
        changed = False
        matmuls = [n for n in program.graph.nodes if n.target in MATMULS and weight_of(n)]
        for node in matmuls:
            number = sets.setdefault(activation_of(node), len(sets))
            changed |= annotate(node, part=Part.MODULE.value, fused_set=number)
        for node in chooses_experts(program.graph):
            changed |= annotate(node, role="router")
        return PassResult(program, changed, (f"{len(matmuls)} matmuls and convolutions",))

    def ensures(self, before: Program, after: Program) -> None:
        if not any(after.nodes(part="module")):
            raise self.refuse("no matmul and no convolution has a weight")
