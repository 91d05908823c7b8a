"""apply-codes: put codes that were frozen once into another capture of the same model.

    linear(x, w) -> linear(x, dequantize(codes[fqn(w)], scales[fqn(w)]))
                    linear(quantize_dequantize(x, input_scales[fqn(w)], ...), ...)

where the input is quantized too; linears that share an input share its rounding.

The plan is made once, on the training graph. A capture in another dtype, a serving graph or a
reloaded artifact gets exactly those codes, by the normalised names of the weights; nothing is
quantized again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from gracec.ir.annotations import experts_notes
from gracec.ir.program import Program, annotate
from gracec.ir.queries import EXPERT_LINEAR, weight_of
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import (
    QUANTIZE_DEQUANTIZE,
    drop_dead_tensors,
    frozen_weights,
    replace_by_codes,
)
from gracec.quant.frozen import FrozenActivation, FrozenWeight

APPLICABLE = (torch.ops.aten.linear.default, EXPERT_LINEAR)


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
        rounded: dict[fx.Node, list[tuple[FrozenActivation, fx.Node]]] = defaultdict(list)
        for node in [node for node in program.graph.nodes if node.target in APPLICABLE]:
            operand = node.args[1]
            weight = weight_of(node)
            if weight is None or (operand is not weight and node.target != EXPERT_LINEAR):
                continue
            names = program.fqns.get(str(weight.target), ())
            frozen = next((self.weights[name] for name in names if name in self.weights), None)
            if frozen is not None:
                annotate(node, quant=frozen.spec.to_dict(), **experts_notes(frozen.experts))
                if frozen.activation is not None:
                    self._round_input(program, node, weight, frozen.activation, rounded)
                replace_by_codes(program, operand, weight, frozen)
                applied += 1
        drop_dead_tensors(program)
        return PassResult(program, applied > 0, (f"codes of {applied} weights applied",))

    @staticmethod
    def _round_input(
        program: Program,
        linear: fx.Node,
        weight: fx.Node,
        activation: FrozenActivation,
        rounded: dict[fx.Node, list[tuple[FrozenActivation, fx.Node]]],
    ) -> None:
        """linear(x, ...) -> linear(quantize_dequantize(x, input_scales, input_zero_points), ...)"""
        x = linear.args[0]
        assert isinstance(x, fx.Node)
        node = next((node for known, node in rounded[x] if known.equals(activation)), None)
        if node is None:
            traced, target = x.meta["val"], str(weight.target)
            stack = dict(linear.meta.get("nn_module_stack") or {})
            operands = []
            tensors = {
                "input_scales": activation.scales,
                "input_zero_points": activation.zero_points,
            }
            with program.graph.inserting_before(linear):
                for name, tensor in tensors.items():
                    path = f"{target}_{name}"
                    program.set_tensor(path, tensor.to(program.device))
                    program.fqns[path] = (f"{program.fqn(target)}.{name}",)
                    operand = program.graph.get_attr(path)
                    operand.meta = {"val": traced.new_empty(tensor.shape, dtype=tensor.dtype)}
                    operand.meta["nn_module_stack"] = stack
                    operands.append(operand)
                node = program.graph.call_function(
                    QUANTIZE_DEQUANTIZE, (x, *operands, activation.spec.bits)
                )
            node.meta = {"val": traced, "nn_module_stack": stack}
            annotate(node, act=activation.spec.to_dict())
            rounded[x].append((activation, node))
        annotate(linear, act=activation.spec.to_dict())
        linear.update_arg(0, node)

    def ensures(self, before: Program, after: Program) -> None:
        missing = sorted(self.weights.keys() - frozen_weights(after).keys())
        if missing:
            raise self.refuse(
                f"{len(missing)} weights have codes but are no linear of this graph",
                where=missing[0],
                fix="the codes belong to another model",
            )
