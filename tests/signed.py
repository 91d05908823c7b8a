"""Graphs and weights half of whose scales are negative, whatever a search would choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gracec import quant
from gracec.ir.program import Program
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant.frozen import FrozenWeight
from gracec.recipe import Recipe


def signed_recipe(**rule: Any) -> Recipe:
    """Of a decoder with signed scales; 4 bits in groups of 32."""
    rule = {"bits": 4, "group_size": 32, "signed": True} | rule
    return Recipe.from_dict({"name": "signed", "weights": {"decoder": rule}})


def half_negative(scales: Tensor) -> Tensor:
    """Signs of some scales: int8, of their shape, every other one -1."""
    signs = torch.ones_like(scales, dtype=torch.int8)
    signs.view(-1)[::2] = -1
    return signs


def fake_quantized_by_halves(analyzed: Program, **rule: Any) -> Program:
    """A program with signed scales, half of which are negative."""
    planned = PlanQuantization(recipe=signed_recipe(**rule)).run(analyzed).program
    return with_halves_negative(InsertFakeQuant(candidates=8).run(planned).program)


def with_halves_negative(program: Program) -> Program:
    """The same program; every other scale becomes negative."""
    for target in [target for target in program.fqns if target.endswith("_scale_sign")]:
        program.set_tensor(target, half_negative(program.tensor(target)))
    return program


def negated_by_halves(weight: FrozenWeight) -> FrozenWeight:
    """Nearly the same weight, with the codes of a group negated wherever its scale has another sign
    than it is to have: every other one negative."""
    signs = half_negative(weight.scales) * weight.scales.sign().to(torch.int8)
    groups = quant.grouped(weight.codes.short(), weight.group_size) * signs.unsqueeze(-1)
    codes = groups.clamp(*quant.code_range(weight.spec.bits)).reshape(weight.shape)
    return replace(
        weight,
        stored=quant.store_codes(codes.to(torch.int8), weight.spec.bits),
        scales=weight.scales * signs,
        spec=replace(weight.spec, signed=True),
    )
