from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracec import ir
from gracec.capture import capture
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.free_scales import FreeScales
from gracec.passes.freeze import (
    SCALE_CODES,
    Freeze,
    frozen_nodes,
    frozen_weights,
)
from gracec.passes.insert_fake_quant import InsertFakeQuant, fake_quantized
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.recipe import Recipe
from tests.frozen_graphs import linear_graph, read_without_plan
from tests.goldens import ONE_BLOCK
from tests.tiny_experts import tiny_experts

Golden = Callable[..., None]
After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
FROZEN = f"{FAKE},freeze"


def signed(captured: Program) -> Program:
    """Frozen by a recipe with signed scales, of which every other group has a negative one."""
    rule = {"group_size": 32, "signed": True}
    recipe = Recipe.from_dict({"name": "signed", "weights": {"decoder": rule}})
    analysed = run_passes(captured, parse_pipeline("analyze-modality")).program
    fake = run_passes(analysed, [PlanQuantization(recipe), InsertFakeQuant()]).program
    for found in fake_quantized(fake):
        signs = fake.tensor(str(found.node.args[7].target))  # type: ignore[union-attr]
        signs.view(-1)[::2] = -1
    return Freeze().run(fake).program


@pytest.mark.parametrize("before", [FAKE, FROZEN])
def test_golden(before: str, after_block: After, golden: Golden) -> None:
    freed = FreeScales().run(after_block(before)).program
    text = ir.diff(after_block(before), freed) + "\n"
    name = "llava-frozen" if before == FROZEN else "llava"
    golden(f"free-scales/{name}.txt", text, made_by=FreeScales(), after=before, model=ONE_BLOCK)


def test_golden_signed(after_block: After, golden: Golden) -> None:
    before = signed(after_block(""))
    text = ir.diff(before, FreeScales().run(before).program) + "\n"
    after = "analyze-modality and freezing signed scales in groups of 32"
    golden("free-scales/llava-signed.txt", text, made_by=FreeScales(), after=after, model=ONE_BLOCK)


@pytest.mark.parametrize("before", [FAKE, FROZEN])
def test_there_and_back_every_bit_is_the_same(
    before: str, after: After, batch: dict[str, Tensor]
) -> None:
    freed = FreeScales().run(after(before)).program
    assert torch.equal(freed(**batch)[0], after(FROZEN)(**batch)[0])
    back = Freeze().run(freed).program
    assert torch.equal(back(**batch)[0], after(FROZEN)(**batch)[0])
    found, expected = frozen_weights(back), frozen_weights(after(FROZEN))
    assert found.keys() == expected.keys()
    for fqn, weight in found.items():
        assert torch.equal(weight.stored, expected[fqn].stored)
        assert torch.equal(weight.scales, expected[fqn].scales)
        assert weight.spec == expected[fqn].spec


def test_negative_scales_stay_negative(after: After, batch: dict[str, Tensor]) -> None:
    before = signed(after(""))
    freed = FreeScales().run(before).program
    assert torch.equal(freed(**batch)[0], before(**batch)[0])
    for node in freed.nodes(SCALE_CODES):
        param, signs = (freed.tensor(str(operand.target)) for operand in node.args[1:3])  # type: ignore[union-attr]
        assert isinstance(param, nn.Parameter) and not isinstance(signs, nn.Parameter)
        assert signs.dtype == torch.int8 and set(signs.unique().tolist()) == {-1, 1}
        with torch.no_grad():
            param += 0.1
    expected = frozen_weights(before)
    for fqn, weight in frozen_weights(Freeze().run(freed).program).items():
        assert torch.equal(weight.scales.sign(), expected[fqn].scales.sign())
        assert bool((weight.scales.abs() > expected[fqn].scales.abs()).all())


def test_float_weights_leave_and_the_parameters_are_the_scales(after: After) -> None:
    freed = FreeScales().run(after(FAKE)).program
    plan = plan_of(after(FAKE))
    names = {name for names in freed.fqns.values() for name in names}
    for fqn, spec in plan.quantized.items():
        assert fqn not in names
        assert {f"{fqn}.codes", f"{fqn}_scale"} <= names
        assert f"{fqn}.scales" not in names and (f"{fqn}_scale_sign" in names) == spec.signed
    assert plan_of(freed) == plan


def test_only_the_scales_get_a_gradient(after: After, batch: dict[str, Tensor]) -> None:
    freed = FreeScales().run(after(FROZEN)).program
    freed.graph_module(**batch)[0].square().mean().backward()
    for node in freed.nodes(SCALE_CODES):
        param = freed.tensor(str(node.args[1].target))  # type: ignore[union-attr]
        assert param.grad is not None and param.grad.abs().max() > 0
        param.grad = None


def test_the_given_program_keeps_its_scales(after: After, batch: dict[str, Tensor]) -> None:
    before = after(FAKE)(**batch)[0]
    freed = FreeScales().run(after(FAKE)).program
    with torch.no_grad():
        for node in freed.nodes(SCALE_CODES):
            freed.tensor(str(node.args[1].target)).add_(1)  # type: ignore[union-attr]
    assert torch.equal(after(FAKE)(**batch)[0], before)


def test_experts() -> None:
    captured = capture(tiny_experts("llava_mixtral", layers=1))
    fake = run_passes(captured, parse_pipeline(FAKE)).program
    batch = fake.example_inputs
    freed = FreeScales().run(fake).program
    back = Freeze().run(freed).program
    assert torch.equal(freed(**batch)[0], fake(**batch)[0])
    assert torch.equal(back(**batch)[0], fake(**batch)[0])
    weights = frozen_weights(back)
    assert any(weight.experts is not None for weight in weights.values())
    assert plan_of(freed) == plan_of(fake)


def test_idempotent(after: After) -> None:
    again = FreeScales().run(FreeScales().run(after(FROZEN)).program)
    assert not again.modified


def test_it_needs_something_quantized(captured: Program) -> None:
    with pytest.raises(PassError, match="free-scales: nothing is quantized"):
        FreeScales().run(captured)


def test_codes_of_which_nothing_is_known_are_left_alone() -> None:
    program = linear_graph().copy()
    (frozen,) = frozen_nodes(program)
    read_without_plan(program, next(iter(frozen.node.users)), frozen.node)
    result = FreeScales().run(program)
    assert not result.modified and not any(result.program.nodes(SCALE_CODES))
    assert result.notes[0] == "weight keeps its scales: nothing says how it was quantized"


def test_scales_beside_their_grid_are_refused() -> None:
    program = linear_graph().copy()
    (frozen,) = frozen_nodes(program)
    assert frozen.weight is not None
    program.set_tensor(f"{frozen.target}_scales", frozen.weight.scales * 1.001)
    with pytest.raises(PassError, match="weight: free-scales: the scales are not on the grid bf16"):
        FreeScales().run(program)


def test_what_each_pass_promises_is_checked(after: After, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = FreeScales().run(after(FAKE)).program
    for cls, program, left in (
        (FreeScales, after(FAKE), "a fake_quantize node is left"),
        (Freeze, freed, "a scale_codes node is left"),
    ):
        monkeypatch.setattr(cls, "apply", lambda self, program: PassResult(program, False))
        with pytest.raises(PassError, match=left):
            cls().run(program)
