"""apply-codes: put codes that were frozen once into another capture of the same model.

    linear(x, w) -> linear(x, dequantize(codes[fqn(w)], scales[fqn(w)]))

The plan is made once, on the training graph. A capture in another dtype, a serving graph or a
reloaded artifact gets exactly those codes, by the normalised names of the weights; nothing is
quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import FrozenWeight, drop_dead_tensors, frozen_weights, replace_by_codes
from gracec.program import Program, annotate

LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class ApplyCodes(Pass):
    """Options: `weights`, FQN -> codes and scales. Has no text form, since codes are not text."""

    weights: Mapping[str, FrozenWeight] = field(default_factory=dict)
    name: ClassVar[str] = "apply-codes"
    keeps_numerics: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        if not self.weights:
            raise self.refuse("there are no codes to apply")

    def apply(self, program: Program) -> PassResult:
        applied = 0
        for node in list(program.nodes(LINEAR)):
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or weight.op != "get_attr":
                continue
            names = program.fqns.get(str(weight.target), ())
            frozen = next((self.weights[name] for name in names if name in self.weights), None)
            if frozen is not None:
                annotate(node, quant=frozen.spec.to_dict())
                replace_by_codes(program, weight, weight, frozen)
                applied += 1
        drop_dead_tensors(program)
        return PassResult(program, applied > 0, (f"codes of {applied} weights applied",))

    def ensures(self, before: Program, after: Program) -> None:
        missing = sorted(self.weights.keys() - frozen_weights(after).keys())
        if missing:
            raise self.refuse(
                f"{len(missing)} weights have codes but are no linear of this graph",
                where=missing[0],
                fix="the codes belong to another model",
            )
