"""free-scales: let the scales of quantized weights learn, and nothing else of them.

    dequantize(codes, scales)               -> scale_codes(codes, w_scale, w_scale_sign)
    fake_quantize(w, w_scale, w_scale_sign) -> scale_codes(codes, w_scale, w_scale_sign)

with codes = clip(round(w / s)) where there are none yet. The parameter `w_scale` is what the spec
of the weight says (the logarithm of the magnitude) and stands for exactly the scales that were
there, so that the program computes the same. Where scales are signed, their signs are a buffer.
Float weights leave the program; `freeze` is the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from gracec import quant
from gracec.ir.program import Program
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import (
    DEQUANTIZE,
    SCALE_CODES,
    FrozenNode,
    drop_dead_tensors,
    freeze_weights,
    frozen_nodes,
)
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE
from gracec.quant.ops import dtype_name


@dataclass(frozen=True)
class FreeScales(Pass):
    """No options."""

    name: ClassVar[str] = "free-scales"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if not any(any(program.nodes(op)) for op in (FAKE_QUANTIZE, SCALE_CODES, DEQUANTIZE)):
            raise self.refuse("nothing is quantized", fix="run insert-fake-quant first")

    def apply(self, program: Program) -> PassResult:
        freeze_weights(program)
        drop_dead_tensors(program)  # scale parameters of that name among them
        count, notes = 0, []
        for frozen in frozen_nodes(program):
            if frozen.weight is None:
                notes.append(f"{frozen.fqn} keeps its scales: nothing says how it was quantized")
                continue
            self._free(program, frozen, frozen.weight)
            count += 1
        drop_dead_tensors(program)
        notes.append(f"{count} weights keep their codes, and their scales may learn")
        return PassResult(program, count > 0, tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        if any(after.nodes(FAKE_QUANTIZE)):
            raise self.refuse("a fake_quantize node is left")

    def _free(self, program: Program, frozen: FrozenNode, weight: quant.FrozenWeight) -> None:
        """dequantize(codes, scales) -> scale_codes(codes, w_scale, signs)"""
        node, spec, scales = frozen.node, weight.spec, weight.scales
        operands: Any = node.args
        param = quant.scale_to_param(scales, spec.parametrization)
        signs = quant.scale_signs(scales) if spec.signed else None
        found = quant.scale_from_param(param, spec.parametrization, spec.scale_grid, signs)
        if not torch.equal(found, scales):
            raise self.refuse(f"the scales are not on the grid {spec.scale_grid}", where=frozen.fqn)
        with program.graph.inserting_before(node):
            learns = self._tensor(program, frozen, "scale", nn.Parameter(param))
            sign = None if signs is None else self._tensor(program, frozen, "scale_sign", signs)
            freed = program.graph.call_function(
                SCALE_CODES,
                (
                    operands[0],
                    learns,
                    sign,
                    operands[2],
                    spec.parametrization,
                    spec.scale_grid,
                    dtype_name(program.dtype),
                ),
            )
        freed.meta = dict(node.meta)
        node.replace_all_uses_with(freed)
        program.graph.erase_node(node)

    @staticmethod
    def _tensor(program: Program, frozen: FrozenNode, suffix: str, tensor: Tensor) -> fx.Node:
        """A get_attr node of a tensor beside the codes, which both calls of a module share."""
        target, like = f"{frozen.target}_{suffix}", frozen.node.args[1]
        assert isinstance(like, fx.Node)
        if target not in program.fqns:
            program.set_tensor(target, tensor)
            program.fqns[target] = (f"{frozen.fqn}_{suffix}",)
        node = program.graph.get_attr(target)
        node.meta = dict(like.meta)
        node.meta["val"] = like.meta["val"].new_empty(tuple(tensor.shape), dtype=tensor.dtype)
        return node
