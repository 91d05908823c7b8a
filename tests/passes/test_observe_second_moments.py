from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracec import ir, quant
from gracec.capture import capture
from gracec.capture.module import capture_module
from gracec.errors import PassError
from gracec.ir.program import Program, annotation
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.contract import check_contract
from gracec.passes.insert_fake_quant import InsertFakeQuant, fake_quantized
from gracec.passes.observe_second_moments import ObserveSecondMoments, moment_observers
from gracec.passes.plan_quantization import PlanQuantization
from gracec.recipe import Recipe
from gracec.training.calibration import synthetic_samples
from tests.goldens import ONE_BLOCK
from tests.nets import conv_net
from tests.tiny import tiny_batch
from tests.tiny_experts import EXPERTS, tiny_experts

Golden = Callable[..., None]
After = Callable[[str], Program]
PLAN = "analyze-modality,plan-quantization"
EVERYWHERE = Recipe.from_dict(
    {
        "name": "everywhere",
        "weights": {part: {"group_size": 32} for part in ("decoder", "projector", "vision")},
    }
)


def recipe(**rule: Any) -> Recipe:
    return Recipe.from_dict({"name": "test", "weights": {"module": rule}})


def planned(net: nn.Module, x: Tensor, **rule: Any) -> Program:
    passes = parse_pipeline("flatten-convolutions,analyze-module")
    program = capture_module(net, {"x": x})
    return run_passes(program, [*passes, PlanQuantization(recipe=recipe(**rule))]).program


def images(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def observed(after: After, batch: dict[str, Tensor]) -> Program:
    return ObserveSecondMoments((batch,)).run(after(PLAN)).program


def test_golden(after_block: After, golden: Golden) -> None:
    text = ir.diff(after_block(PLAN), after_block(f"{PLAN},observe-second-moments")) + "\n"
    made_by = ObserveSecondMoments()
    golden("observe-second-moments/llava.txt", text, made_by=made_by, after=PLAN, model=ONE_BLOCK)


def test_observing_changes_no_bit(
    captured: Program, observed: Program, batch: dict[str, Tensor]
) -> None:
    assert torch.equal(observed(**batch)[0], captured(**batch)[0])


def test_linears_that_share_an_activation_share_its_observer(observed: Program) -> None:
    nodes = [node for node, _ in moment_observers(observed)]
    assert sorted(len(node.users) for node in nodes) == 4 * [1] + 2 * [2] + 2 * [3]


def test_they_are_the_mean_squares_of_all_samples(after: After, batch: dict[str, Tensor]) -> None:
    start = after(PLAN)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    program = ObserveSecondMoments((batch, other)).run(start).program
    sources = [node.args[0].name for node, _ in moment_observers(program)]
    seen: dict[str, list[Tensor]] = {name: [] for name in sources}
    for sample in (batch, other):
        interpreter = torch.fx.Interpreter(start.graph_module, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(*(sample[name] for name in start.example_inputs))
        for node, value in interpreter.env.items():
            if node.name in seen:
                seen[node.name].append(value.reshape(-1, value.shape[-1]))
    for (_, observer), name in zip(moment_observers(program), sources, strict=True):
        expected = torch.cat(seen[name]).square().mean(0)
        torch.testing.assert_close(observer.moments.means()[0], expected)


def test_what_runs_the_program_later_does_not_count(
    observed: Program, batch: dict[str, Tensor]
) -> None:
    before = [observer.sums.clone() for _, observer in moment_observers(observed)]
    observed(**{**batch, "pixel_values": 100 * batch["pixel_values"]})
    after = [observer.sums for _, observer in moment_observers(observed)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_text_says_nothing_about_pictures(captured: Program, batch: dict[str, Tensor]) -> None:
    start = run_passes(
        captured, [*parse_pipeline("analyze-modality"), PlanQuantization(EVERYWHERE)]
    )
    text = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}

    def means(*samples: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        program = ObserveSecondMoments(samples).run(start.program).program
        found: dict[str, list[Tensor]] = {"vision": [], "text": []}
        for node, observer in moment_observers(program):
            kind = "vision" if annotation(node).get("modality") == "vision" else "text"
            found[kind].append(observer.sums)
        return found

    alone, both, picture = means(text), means(text, batch), means(batch)
    assert alone["vision"] and not any(sums.any() for sums in alone["vision"])
    assert all(sums.any() for sums in alone["text"])
    for one, other in zip(both["vision"], picture["vision"], strict=True):
        assert torch.equal(one, other)
    program = ObserveSecondMoments((text,)).run(start.program).program
    weights_alone = {f.fqn: f.scales for f in fake_quantized(run(start.program))}
    weighed = {f.fqn: f.scales for f in fake_quantized(run(program))}
    same = {fqn for fqn, s in weighed.items() if torch.equal(s, weights_alone[fqn])}
    assert same == {fqn for fqn in weighed if "language_model" not in fqn}


def run(program: Program) -> Program:
    return InsertFakeQuant().run(program).program


def test_the_search_of_scales_is_weighed_by_them(observed: Program, after: After) -> None:
    program = run(observed)
    assert not list(moment_observers(program))
    observers = {
        user.args[1].target: observer
        for node, observer in moment_observers(observed)
        for user in node.users
    }
    for fake in fake_quantized(program):
        (counts,) = observers[fake.node.args[0].target].moments.means()  # type: ignore[union-attr]
        given = fake.weight, fake.bits, fake.group_size
        expected = quant.search_scales(*given, signed=True, importance=counts)
        assert torch.equal(fake.scales, expected)
        assert not torch.equal(fake.scales, quant.search_scales(*given, signed=True))


def test_each_group_of_a_convolution_has_its_own() -> None:
    x = images(0)
    program = (
        ObserveSecondMoments(({"x": x},))
        .run(planned(conv_net(), x, bits=4, granularity="per_channel"))
        .program
    )
    observers = [observer for _, observer in moment_observers(program)]
    assert [tuple(observer.sums.shape) for observer in observers] == [
        *((1, 27), (16, 9), (1, 48), (1, 32))
    ]
    assert len({tuple(row) for row in observers[1].sums.tolist()}) == 16
    scales = {fake.fqn: fake for fake in fake_quantized(run(program))}
    depthwise = scales["depthwise.weight"]
    for filter_, counts in enumerate(observers[1].moments.means()):
        weight = depthwise.weight[filter_ : filter_ + 1]
        expected = quant.search_scales(weight, 4, 9, importance=counts)
        assert torch.equal(depthwise.scales[filter_ : filter_ + 1], expected)


def test_one_scale_of_a_whole_convolution_weighs_all_groups() -> None:
    x = images(0)
    start = planned(conv_net(), x, bits=8, granularity="per_tensor")
    program = run(ObserveSecondMoments(({"x": x},)).run(start).program)
    assert {tuple(fake.scales.shape) for fake in fake_quantized(program)} == {(1, 1)}


def test_each_expert_has_its_own() -> None:
    program = run_passes(capture(tiny_experts("llava_mixtral", layers=1)), parse_pipeline(PLAN))
    program = ObserveSecondMoments().run(program.program).program
    parts = [len(observer.sums) for _, observer in moment_observers(program)]
    assert parts == [1, 1, EXPERTS, EXPERTS]
    up = [observer for _, observer in moment_observers(program)][2]
    assert sum(up.moments.counts) == 2 * program.example_inputs["input_ids"].numel()
    assert len({tuple(row) for row in up.sums.tolist()}) == EXPERTS
    run(program)


def test_synthetic_samples_will_do(block: Any, after_block: After) -> None:
    samples = synthetic_samples(block, tokens=200)
    result = ObserveSecondMoments(samples).run(after_block(PLAN))
    assert list(result.notes) == [f"4 inputs observed on {len(samples)} samples"]
    assert all(observer.moments.seen for _, observer in moment_observers(result.program))


def test_the_contract_on_samples(after: After, batch: dict[str, Tensor]) -> None:
    check_contract(ObserveSecondMoments((batch,)), after(PLAN), batch)
    check_contract(ObserveSecondMoments((tiny_batch(),)), after(f"{PLAN}{{recipe=w8a8}}"), batch)


def test_without_a_plan_it_refuses(captured: Program) -> None:
    with pytest.raises(PassError, match="no weight has a plan; run plan-quantization first"):
        ObserveSecondMoments().run(captured)
