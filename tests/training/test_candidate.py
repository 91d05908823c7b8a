"""Codes that are written into a graph to be trained come back from freezing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gracec.capture import capture
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant import FrozenWeight, code_range, round_scale
from gracec.quant.frozen import code_hash
from gracec.recipe import Recipe
from gracec.training.candidate import tensors_of, write_codes
from tests.tiny_experts import tiny_experts


def with_own_tensors(program: Program) -> Program:
    own = program.copy()
    for target in own.fqns:
        tensor = own.tensor(target).detach().clone()
        parameter = isinstance(program.tensor(target), nn.Parameter)
        own.set_tensor(target, nn.Parameter(tensor) if parameter else tensor)
    return own


def fake(program: Program, **rule: object) -> Program:
    """Fake-quantized by a recipe of its own, from a capture."""
    recipe = Recipe.from_dict({"name": "t", "weights": {"decoder": {"group_size": 32, **rule}}})
    passes = [PlanQuantization(recipe), InsertFakeQuant(candidates=8)]
    analysed = run_passes(program, parse_pipeline("analyze-modality")).program
    return with_own_tensors(run_passes(analysed, passes).program)


def other_codes(program: Program) -> dict[str, FrozenWeight]:
    """Random codes, every width of scale on the grid, and signs where the spec has them."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for fqn, weight in frozen_weights(Freeze().run(program).program).items():
        low, high = code_range(weight.spec.bits)
        codes = torch.randint(low, high + 1, tuple(weight.shape), generator=generator)
        exponents = torch.empty(weight.scales.shape).uniform_(-17, 15, generator=generator)
        scales = round_scale(exponents.exp2(), weight.spec.scale_grid)
        if weight.spec.signed:
            scales *= 2 * torch.randint(0, 2, tuple(scales.shape), generator=generator) - 1
        found[fqn] = FrozenWeight.from_codes(
            codes.to(torch.int8), scales, weight.spec, weight.experts
        )
    return found


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"signed": True},
        {"parametrization": "lsq", "bits": 2, "signed": True},
        {"bits": 8, "granularity": "per_channel"},
        {"granularity": "per_tensor"},
    ],
    ids=str,
)
def test_freezing_gives_the_codes_and_scales_again(
    rule: dict[str, object], captured: Program
) -> None:
    program = fake(captured, **rule)
    wanted = other_codes(program)
    write_codes(program, wanted)
    found = frozen_weights(Freeze().run(program).program)
    assert {fqn: code_hash(one) for fqn, one in found.items()} == {
        fqn: code_hash(one) for fqn, one in wanted.items()
    }


def test_of_experts_too() -> None:
    program = fake(capture(tiny_experts("llava_mixtral", layers=1)))
    wanted = other_codes(program)
    assert any(weight.experts is not None for weight in wanted.values())
    write_codes(program, wanted)
    for fqn, found in frozen_weights(Freeze().run(program).program).items():
        assert code_hash(found) == code_hash(wanted[fqn])


def test_what_is_not_in_it_stays(captured: Program) -> None:
    program = fake(captured, signed=True)
    before = {target: program.tensor(target).detach().clone() for target in program.fqns}
    fqn, weight = next(iter(other_codes(program).items()))
    write_codes(program, {fqn: weight})
    written = {id(tensor) for tensor in tensors_of(program, {fqn: weight})}
    changed = {t for t, was in before.items() if not torch.equal(was, program.tensor(t))}
    assert {program.fqn(target) for target in changed} == {
        fqn,
        f"{fqn}_scale",
        f"{fqn}_scale_sign",
    }
    assert {id(program.tensor(target)) for target in changed} == written


def test_what_cannot_be_held_exactly_is_refused(captured: Program) -> None:
    program = fake(captured)
    fqn, weight = next(iter(other_codes(program).items()))
    negative = FrozenWeight(weight.stored, -weight.scales, weight.spec)
    for scales in (negative.scales, weight.scales * 1.001):
        with pytest.raises(GracecError, match=f"{fqn}: the candidate has scales that are not on"):
            write_codes(program, {fqn: FrozenWeight(weight.stored, scales, weight.spec)})
    with pytest.raises(GracecError, match="the candidate has nothing, which is not fake-quantized"):
        write_codes(program, {"nothing": weight})
    target = next(target for target in program.fqns if program.fqn(target) == fqn)
    program.set_tensor(target, nn.Parameter(program.tensor(target).detach().bfloat16()))
    with pytest.raises(GracecError, match="products that torch.bfloat16 does not hold"):
        write_codes(program, {fqn: weight})
