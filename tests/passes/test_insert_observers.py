from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracec import ir
from gracec.capture import capture
from gracec.errors import GracecError, PassError
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.freeze import Freeze
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE_ACTIVATION, InsertFakeQuant
from gracec.passes.insert_observers import InsertObservers, observer_nodes
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant.observers import Observer
from gracec.recipe import Recipe
from tests.goldens import ONE_BLOCK
from tests.tiny import tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
PLAN = "analyze-modality,plan-quantization{recipe=w4a8}"


@pytest.fixture(scope="module")
def observed(after: After, batch: dict[str, Tensor]) -> Program:
    return InsertObservers((batch,)).run(after(PLAN)).program


def test_golden(after_block: After, golden: Golden) -> None:
    text = ir.diff(after_block(PLAN), after_block(f"{PLAN},insert-observers")) + "\n"
    made_by = InsertObservers()
    golden("insert-observers/llava.txt", text, made_by=made_by, after=PLAN, model=ONE_BLOCK)


def test_golden_of_the_whole_way_for_a_vision_tower(after: After, golden: Golden) -> None:
    plan, rest = PLAN.replace("w4a8", "w8a8"), "insert-observers,insert-fake-quant,freeze"
    text = ir.diff(after(plan), after(f"{plan},{rest}")) + "\n"
    golden("insert-observers/llava-w8a8-frozen.txt", text, made_by=rest, after=plan)


def test_observing_changes_no_bit(
    captured: Program, observed: Program, batch: dict[str, Tensor]
) -> None:
    assert torch.equal(observed(**batch)[0], captured(**batch)[0])


def test_linears_that_share_an_activation_share_its_observer(observed: Program) -> None:
    assert len(list(observer_nodes(observed))) == 8  # 4 per block: qkv, o, gate and up, down
    assert sorted(len(node.users) for node in observer_nodes(observed)) == 2 * [1] + 2 * [1] + 2 * [
        2
    ] + 2 * [3]


def test_idempotent(observed: Program, batch: dict[str, Tensor]) -> None:
    assert not InsertObservers((batch,)).run(observed).modified


def test_without_samples_it_says_what_it_did(after: After) -> None:
    (note,) = InsertObservers().run(after(PLAN)).notes
    assert "on the EXAMPLE inputs only" in note


def test_refusals(captured: Program, after: After) -> None:
    with pytest.raises(PassError, match="run plan-quantization first"):
        InsertObservers().run(captured)
    with pytest.raises(PassError, match="the recipe quantizes no activations"):
        InsertObservers().run(after("analyze-modality,plan-quantization"))
    with pytest.raises(PassError, match="was not observed; run insert-observers first"):
        InsertFakeQuant().run(after(PLAN))


def test_a_group_of_activations_that_does_not_divide_is_refused(after: After) -> None:
    recipe = Recipe.from_dict(
        {
            "name": "test",
            "weights": {"decoder": {"group_size": 64}},
            "activations": {"decoder": {"granularity": "per_group", "group_size": 128}},
        }
    )
    with pytest.raises(PassError, match="activations: group_size 128 does not divide the 64"):
        PlanQuantization(recipe=recipe).run(after("analyze-modality"))


def test_scales_train_and_freeze_like_those_of_weights(
    observed: Program, batch: dict[str, Tensor]
) -> None:
    fake = InsertFakeQuant().run(observed).program
    assert not list(observer_nodes(fake))
    scales = [t for t in fake.fqns if t.endswith("input_scale")]
    assert len(scales) == len(list(fake.nodes(FAKE_QUANTIZE_ACTIVATION))) == 8
    before = fake(**batch)[0]
    before.square().mean().backward()
    with torch.no_grad():
        for target in scales:
            scale = fake.tensor(target)
            assert isinstance(scale, nn.Parameter)
            assert scale.grad is not None
            assert scale.grad.abs().sum() > 0
            scale -= 0.05 * scale.grad.sign()
            scale.grad = None
    trained = fake(**batch)[0]
    assert not torch.equal(trained, before)
    frozen = Freeze().run(fake).program
    assert torch.equal(frozen(**batch)[0], trained)
    assert not any(target.endswith("input_scale") for target in frozen.fqns)


def test_running_an_observed_program_does_not_move_its_scales(
    observed: Program, batch: dict[str, Tensor]
) -> None:
    def scales() -> list[Tensor]:
        modules = [observed.graph_module.get_submodule(n.target) for n in observer_nodes(observed)]
        return [module.scales_and_zero_points()[0] for module in modules]

    before = scales()
    observed(**{**batch, "pixel_values": 100 * batch["pixel_values"]})
    assert all(torch.equal(a, b) for a, b in zip(before, scales(), strict=True))


def test_whole_channels_of_any_width_freeze(batch: dict[str, Tensor]) -> None:
    model = tiny_llava(vision_hidden_size=48, vision_intermediate_size=80)
    start = run_passes(
        capture(model), parse_pipeline("analyze-modality,plan-quantization{recipe=w8a8}")
    ).program
    fake = run_passes(start, [InsertObservers((batch,)), InsertFakeQuant()]).program
    assert torch.equal(Freeze().run(fake).program(**batch)[0], fake(**batch)[0])


def test_codes_stay_on_the_grid_in_the_frozen_graph(
    observed: Program, batch: dict[str, Tensor]
) -> None:
    frozen = run_passes(observed, parse_pipeline("insert-fake-quant,freeze")).program
    interpreter = torch.fx.Interpreter(frozen.graph_module, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*(batch[name] for name in frozen.example_inputs))
    for node in frozen.nodes(torch.ops.gracec.quantize_dequantize.default):
        value = interpreter.env[node]
        assert len(value.unique()) <= 256


def test_activations_of_weights_that_are_kept_are_refused() -> None:
    fields = {"name": "test", "weights": {}, "activations": {"decoder": {}}}
    with pytest.raises(GracecError, match=r"activations\.decoder needs weights\.decoder"):
        Recipe.from_dict(fields)


def test_an_observer_that_saw_nothing_is_an_error(
    after: After, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Observer, "forward", lambda self, x: x)
    with pytest.raises(PassError, match="insert-observers: .* has observed nothing"):
        InsertObservers((batch,)).run(after(PLAN))
