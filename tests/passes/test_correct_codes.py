"""Codes are those of GPTQ on what the quantized layers before feed, never worse than rounding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracec import ir, quant
from gracec.capture import capture
from gracec.capture.module import capture_module
from gracec.errors import PassError
from gracec.ir.program import Program, annotation
from gracec.ir.stream import Stream
from gracec.passes import correct_codes as correct_codes_
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.contract import check_contract
from gracec.passes.correct_codes import CorrectCodes, Corrected, fused_sets, output_errors
from gracec.passes.freeze import DEQUANTIZE, Freeze, frozen_weights
from gracec.passes.insert_fake_quant import (
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_ACTIVATION,
    InsertFakeQuant,
    fake_quantized,
)
from gracec.passes.insert_observers import InsertObservers
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant.frozen import FrozenWeight, check_frozen, code_hash
from gracec.quant.gptq import compensated, corrected_codes, factor
from gracec.quant.observers import weight_scales
from gracec.quant.second_moments import blocks_of, importance
from gracec.recipe import Recipe
from tests.backends.artifacts import random_weight
from tests.goldens import ONE_BLOCK
from tests.nets import conv_net
from tests.tiny import tiny_batch, tiny_llava
from tests.tiny_experts import EXPERTS, tiny_experts

Golden = Callable[..., None]
After = Callable[[str], Program]
Inputs = dict[str, Tensor]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
LONG = "what is the small red circle below the big green square in this picture ?"


class Net(nn.Module):
    """Two layers one after the other, and a third that reads what the second does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64)
        self.third = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.first(x))
        result: Tensor = torch.cat([self.second(hidden), self.third(hidden)], -1)
        return result


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def mixed(seed: int, count: int = 40, features: int = 64) -> Tensor:
    """Correlated inputs, of several sizes; the same mixture for every seed."""
    generator = torch.Generator().manual_seed(99)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    sizes = torch.rand(features, generator=generator) * 3 + 0.1
    generator.manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    return x @ (mixing + torch.eye(features)) * sizes


def samples_of(*seeds: int, **options: int) -> list[Inputs]:
    return [{"x": mixed(seed, **options)} for seed in seeds]


CALIBRATING, HELD_OUT = samples_of(0, 1, 2, 3, 4), samples_of(10, 11)


def recipe(**rule: Any) -> Recipe:
    return Recipe.from_dict({"name": "test", "weights": {"module": rule}})


def fake(module: nn.Module, x: Tensor, **rule: Any) -> Program:
    """A module with fake-quantized weights."""
    rule = {"bits": 4, "group_size": 32} | rule
    passes = parse_pipeline("flatten-convolutions,analyze-module")
    passes = [*passes, PlanQuantization(recipe=recipe(**rule)), InsertFakeQuant()]
    return run_passes(capture_module(module, {"x": x}), passes).program


def hashes(program: Program) -> dict[str, str]:
    return {fqn: code_hash(weight) for fqn, weight in frozen_weights(program).items()}


def moments_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_golden(after_block: After, golden: Golden) -> None:
    text = ir.diff(after_block(FAKE), after_block(f"{FAKE},correct-codes")) + "\n"
    text = re.sub(r"output_error=\[[^]]*\]", "output_error=[...]", text)
    golden("correct-codes/llava.txt", text, made_by=CorrectCodes(), after=FAKE, model=ONE_BLOCK)


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize(("bits", "share"), [(4, 0.0), (3, 0.0), (3, 0.5), (2, 1.0)])
def test_codes_are_those_of_gptq_on_what_the_quantized_layers_feed(
    bits: int, share: float, order: str
) -> None:
    """All of the pass in a few lines: nothing held out is calibrated on."""
    model, damping = net(), 0.02
    program = fake(model, mixed(0), bits=bits)
    item = CorrectCodes(CALIBRATING, HELD_OUT, damping, order, share)
    found = frozen_weights(item.run(program).program)
    x = torch.cat([sample["x"] for sample in CALIBRATING])

    def solved(layer: nn.Linear, given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        moments = moments_of(given)
        factored = factor(moments, damping, by_activation=order == "activation")
        assert factored is not None and factored.damping == damping
        weight = layer.weight.detach()
        cross = (wanted - given).T @ given / len(given)
        weight = compensated(weight, moments, cross, share) if share else weight
        weighed: dict[str, Tensor] = {"importance": importance(moments.diagonal())}
        if bits <= 3:
            weighed = {"blocks": blocks_of(moments, 32)}
        scales = quant.search_scales(weight, bits, 32, **weighed)
        return corrected_codes(weight, scales, bits, 32, factored), scales

    codes, scales = solved(model.first, x, x)
    check(found["first.weight"], codes, scales)
    with torch.no_grad():
        wanted = nn.functional.silu(model.first(x))
        first = quant.dequantize(codes, scales, 32)
        given = nn.functional.silu(nn.functional.linear(x, first, model.first.bias))
        for name in ("second", "third"):
            check(found[f"{name}.weight"], *solved(getattr(model, name), given, wanted))


def check(found: FrozenWeight, codes: Tensor, scales: Tensor) -> None:
    """All but equal: sums of another order may turn a tie."""
    assert (found.scales != scales).float().mean() < 0.02
    assert (found.codes != codes).float().mean() < 0.02


def test_the_errors_are_those_of_the_outputs_on_held_out_inputs() -> None:
    model = net()
    program = fake(model, mixed(0))
    result = CorrectCodes(CALIBRATING, HELD_OUT).run(program).program
    weights, errors = frozen_weights(result), output_errors(result)
    x = torch.cat([sample["x"] for sample in HELD_OUT])
    with torch.no_grad():
        wanted = nn.functional.silu(model.first(x))
        first = weights["first.weight"].dequantize()
        given = nn.functional.silu(nn.functional.linear(x, first, model.first.bias))
    for name, inputs, originals in (
        ("first", x, x),
        ("second", given, given),  # without the asymmetric correction the same inputs count
        ("third", given, given),
    ):
        weight = getattr(model, name).weight.detach()
        frozen = weights[f"{name}.weight"]
        plain = weight_scales(weight, frozen.spec, "min_max")
        rounded = quant.fake_quantize(weight, plain, 4, 32)
        target = originals @ weight.T
        for place, tried in ((0, rounded), (2, frozen.dequantize())):
            error = (target - inputs @ tried.T).square().sum() / target.square().sum()
            assert errors[f"{name}.weight"][place] == pytest.approx(float(error), rel=1e-3)
        assert errors[f"{name}.weight"][2] < 0.8 * errors[f"{name}.weight"][0]
    assert wanted.shape == given.shape


def test_the_outputs_are_nearer_than_those_of_rounding_and_of_weights_alone() -> None:
    model = net()
    program = fake(model, mixed(0))
    plain = fake(model, mixed(0), observer="min_max")
    corrected = CorrectCodes(CALIBRATING, HELD_OUT).run(program).program
    x = mixed(77, 200)
    with torch.no_grad():
        expected = model(x)
        errors = [(p(x=x)[0] - expected).square().sum() for p in (plain, program, corrected)]
    assert errors[2] < 0.7 * min(errors[:2])


def test_two_runs_give_the_same_bits(after_block: After, block: Any) -> None:
    start, samples = after_block(FAKE), prompts(block, "what is this ?", LONG)
    one, other = (CorrectCodes(samples).run(start).program for _ in range(2))
    assert hashes(one) == hashes(other) and len(hashes(one)) == 7
    assert output_errors(one) == output_errors(other)


def prompts(model: Any, *texts: str) -> list[Inputs]:
    """A sample of each, with a picture of its own."""
    return [tiny_batch(model, (text,), seed=seed) for seed, text in enumerate(texts)]


def test_freezing_keeps_the_codes(after_block: After, block: Any) -> None:
    corrected = CorrectCodes(prompts(block, LONG)).run(after_block(FAKE)).program
    result = Freeze().run(corrected)
    assert not result.modified and list(result.notes) == ["0 weights frozen to codes"]
    assert hashes(result.program) == hashes(corrected)
    inputs = corrected.example_inputs
    assert torch.equal(result.program(**inputs)[0], corrected(**inputs)[0])
    for fqn, weight in frozen_weights(corrected).items():
        check_frozen(weight, fqn, where="test")


def test_a_weight_that_lies_on_its_grid_keeps_its_codes() -> None:
    """Fine-tuned on a grid of 32 weights, say, and stored in bfloat16: nothing of it is rounded."""
    module, spec = net(), quant.QuantSpec(4, 32, signed=True)
    given = random_weight((96, 64), spec, seed=0)
    with torch.no_grad():
        module.first.weight.copy_(given.dequantize(torch.bfloat16))
        module.third.weight.copy_(
            random_weight((32, 96), quant.QuantSpec(4, 16), 1).dequantize(torch.bfloat16)
        )
    passes = parse_pipeline("flatten-convolutions,analyze-module")
    rule = recipe(bits=4, group_size=32, signed=True)
    planned = [*passes, PlanQuantization(recipe=rule)]
    program = run_passes(capture_module(module, CALIBRATING[0]), planned).program
    inserted = InsertFakeQuant().run(program)
    assert inserted.notes == (
        "3 weights fake-quantized",
        "1 weights lie on a grid of int4/g32/signed: their codes are taken as they are",
        "1 weights lie on a grid of g16, which int4/g32/signed does not hold: quantized anew",
    )
    corrected = CorrectCodes(CALIBRATING, HELD_OUT).run(inserted.program)
    assert not any("not calibrated" in note for note in corrected.notes)
    assert not any("first.weight" in each.weights for each in fused_sets(inserted.program))
    frozen = frozen_weights(Freeze().run(corrected.program).program)
    assert torch.equal(
        frozen["first.weight"].dequantize(torch.bfloat16), given.dequantize(torch.bfloat16)
    )
    again = frozen["first.weight"].codes.abs()
    assert torch.equal(again, given.codes.abs())  # both signs of a group say the same


def test_what_is_left_is_frozen_beside_what_was_corrected(after_block: After, block: Any) -> None:
    """The graph computes with the very codes that it is frozen to."""
    everywhere = whole(after_block, {"decoder": {"group_size": 32}, "vision": {"group_size": 32}})
    text = {name: prompts(block, LONG)[0][name] for name in ("input_ids", "attention_mask")}
    corrected = CorrectCodes((text,)).run(everywhere).program
    frozen = Freeze().run(corrected).program
    inputs = corrected.example_inputs
    assert torch.equal(frozen(**inputs)[0], corrected(**inputs)[0])
    assert hashes(corrected).items() <= hashes(frozen).items()
    assert len(hashes(corrected)) < len(hashes(frozen))


def whole(after_block: After, weights: Mapping[str, Any]) -> Program:
    """One block of a decoder, and what is before it, by a recipe of one's own."""
    rule = Recipe.from_dict({"name": "test", "weights": dict(weights)})
    passes = [PlanQuantization(recipe=rule), InsertFakeQuant()]
    return run_passes(after_block("analyze-modality"), passes).program


def test_a_text_corrects_no_weight_of_the_tower(after_block: After, block: Any) -> None:
    rule = {part: {"group_size": 32} for part in ("decoder", "projector", "vision")}
    start = whole(after_block, rule)
    (picture,) = prompts(block, LONG)
    text = {name: picture[name] for name in ("input_ids", "attention_mask")}
    result = CorrectCodes((text,)).run(start)
    left = {one.fqn: one for one in fake_quantized(result.program)}
    assert left and all("language_model" not in fqn for fqn in left)
    assert f"{len(left)} weights not calibrated: no sample reaches them" in result.notes
    before = {one.fqn: one for one in fake_quantized(start)}
    for fqn, one in left.items():
        assert torch.equal(one.scales, before[fqn].scales)
        assert torch.equal(one.weight, before[fqn].weight)
    assert set(hashes(result.program)) == {fqn for fqn in before if "language_model" in fqn}
    check_contract(CorrectCodes((text,)), start)
    # Beside a picture the text says nothing about it.
    both = hashes(CorrectCodes((text, picture)).run(start).program)
    alone = hashes(CorrectCodes((picture,)).run(start).program)
    same = {fqn for fqn, found in both.items() if found == alone[fqn]}
    assert set(left) <= same and same != set(both)


def test_what_no_held_out_sample_reaches_is_compared_on_the_others(
    after_block: After, block: Any
) -> None:
    start = whole(after_block, {"decoder": {"group_size": 32}, "vision": {"group_size": 32}})
    (picture,) = prompts(block, LONG)
    text = {name: picture[name] for name in ("input_ids", "attention_mask")}
    result = CorrectCodes((picture,), (text,)).run(start)
    told = {note for note in result.notes if "no held-out sample reaches it" in note}
    assert len(told) == 4 and all("vision_tower" in note for note in told)
    for plain, _, taken in output_errors(result.program).values():
        assert 0 < taken <= plain


def one_direction(seed: int) -> Tensor:
    """Inputs whose features are all but the same."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(60, 1, generator=generator)
    return common + 0.02 * torch.randn(60, 64, generator=generator)


def test_where_correcting_is_worse_on_held_out_inputs_the_weight_is_rounded() -> None:
    """In calibration only the sum of the features is seen, and then each of them counts."""
    program = fake(net(), mixed(0), bits=3)
    generator = torch.Generator().manual_seed(5)
    other = [{"x": torch.randn(200, 64, generator=generator)}]
    samples = [{"x": one_direction(seed)} for seed in range(3)]
    result = CorrectCodes(samples, other, asymmetric=0.0).run(program)
    errors = output_errors(result.program)
    assert all(taken <= plain for plain, _, taken in errors.values())
    first = next(node for node in result.program.nodes(part="module"))
    assert annotation(first)["codes"] == "rounded"
    (note,) = [note for note in result.notes if "rounded" in note]
    assert note.startswith("first.weight")
    assert note.endswith("rounded, nothing better was found on held-out inputs")
    # The same inputs held out: what was corrected is better on them.
    same = CorrectCodes(samples, samples, asymmetric=0.0).run(program)
    assert not any("rounded" in note for note in same.notes)


def test_of_a_weight_that_is_rounded_the_better_scales_are_taken() -> None:
    """Held-out inputs on which the search for scales loses as well give plain rounding."""
    weight = net().first.weight.detach()
    program = fake(net(), mixed(0), bits=3)
    seen = torch.zeros(50, 64)
    seen[:, ::32] = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    unseen = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    unseen[:, ::32] = 0
    result = CorrectCodes([{"x": seen}], [{"x": unseen}], asymmetric=0.0).run(program).program
    plain, searched, taken = output_errors(result)["first.weight"]
    found = frozen_weights(result)["first.weight"]
    scales = weight_scales(weight, found.spec, "min_max")
    assert searched > plain == taken
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes, quant.quantize(weight, scales, 3, 32))


def test_shares_are_tried_at_few_bits_and_the_divergence_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = fake(net(), mixed(0), bits=3)
    for best in (1.0, 0.25, 0.0):
        monkeypatch.setattr(
            correct_codes_._Run, "divergence", lambda run, found, b=best: abs(run.share - b)
        )
        result = CorrectCodes(CALIBRATING, HELD_OUT).run(program)
        fixed = CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=best).run(program)
        assert hashes(result.program) == hashes(fixed.program)
        told = [note for note in result.notes if note.startswith("asymmetric")]
        assert [note.split(":")[0] for note in told] == [
            *("asymmetric 1", "asymmetric 0.25", "asymmetric 0")
        ]
        assert f"asymmetric {best:g}: error 0 of the outputs on held-out samples" in told
        assert not any(note.startswith("asymmetric") for note in fixed.notes)


def test_with_more_bits_no_share_is_tried() -> None:
    program = fake(net(), mixed(0))
    result = CorrectCodes(CALIBRATING, HELD_OUT).run(program)
    assert list(result.notes) == ["codes of 3 weights corrected on 5 samples"]
    none = CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=0.0).run(program)
    some = CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=0.5).run(program)
    assert hashes(result.program) == hashes(none.program) != hashes(some.program)


def test_the_divergence_is_that_of_the_logits_on_what_was_held_out(
    block: Any, after_block: After
) -> None:
    start = whole(after_block, {"decoder": {"bits": 3, "group_size": 32}})
    samples, held_out = prompts(block, "what is this ?", LONG), prompts(block, LONG + " ?")
    result = CorrectCodes(samples, held_out).run(start)
    found = {
        float(share): float(kl)
        for share, kl in re.findall(r"asymmetric (\S+): KL (\S+) nats", "\n".join(result.notes))
    }
    with torch.no_grad():
        expected = after_block("")(**held_out[0])[0].double().log_softmax(-1)
    for share, kl in found.items():
        program = CorrectCodes(samples, held_out, asymmetric=share).run(start).program
        with torch.no_grad():
            other = program(**held_out[0])[0].double().log_softmax(-1)
        wanted = (expected.exp() * (expected - other)).sum(-1).mean()
        assert kl == pytest.approx(float(wanted), rel=0.05)
        if kl == min(found.values()):
            assert hashes(program) == hashes(result.program)


def test_without_logits_the_error_of_all_outputs_decides() -> None:
    model = net()
    program = fake(model, mixed(0), bits=3)
    result = CorrectCodes(CALIBRATING, HELD_OUT).run(program)
    x = torch.cat([sample["x"] for sample in HELD_OUT])
    found = re.findall(r"asymmetric (\S+): error (\S+) of the outputs", "\n".join(result.notes))
    assert len(found) == 3
    for share, error in found:
        item = CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=float(share))
        other = item.run(program).program
        with torch.no_grad():
            expected = model(x)
            wanted = (other(x=x)[0] - expected).square().sum() / expected.square().sum()
        assert float(error) == pytest.approx(float(wanted), rel=0.01)
        if float(error) == min(float(one) for _, one in found):
            assert hashes(other) == hashes(result.program)


def test_a_matrix_without_a_factor_is_rounded_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(correct_codes_, "factor", lambda *given, **options: None)
    model = net()
    result = CorrectCodes(CALIBRATING, HELD_OUT).run(fake(model, mixed(0)))
    why = "the second moments have no factor, codes are rounded"
    assert {f"first.weight: {why}", f"second.weight: {why}"} <= set(result.notes)
    found = frozen_weights(result.program)["first.weight"]
    assert torch.equal(found.codes, quant.quantize(model.first.weight, found.scales, 4, 32))
    _, searched, taken = output_errors(result.program)["first.weight"]
    assert searched == taken


def test_damping_that_had_to_be_raised_is_said() -> None:
    few = [{"x": mixed(0, 3)}]
    result = CorrectCodes(few, damping=1e-9).run(fake(net(), mixed(0)))
    assert any(re.match(r"first.weight: damping 1e-\d+ was needed", n) for n in result.notes)


def test_nothing_is_left_in_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stream] = []

    class Watched(Stream):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(correct_codes_, "Stream", Watched)
    CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=0.5).run(fake(net(), mixed(0)))
    assert len(made) == 2
    assert [stream._values for stream in made] == [{}, {}]


@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
@pytest.mark.parametrize("observer", ["mse", "min_max", "percentile"])
def test_scales_of_every_observer_and_granularity(observer: str, granularity: str) -> None:
    """Those of another observer, and one of a whole weight, stay as they are."""
    start = fake(net(), mixed(0), observer=observer, granularity=granularity)
    result = CorrectCodes(CALIBRATING, HELD_OUT).run(start).program
    weights = frozen_weights(result)
    for one in fake_quantized(start):
        found = weights[one.fqn]
        check_frozen(found, one.fqn, where="test")
        kept = observer != "mse" or granularity == "per_tensor"
        assert torch.equal(found.scales, one.scales) == kept
    for plain, searched, taken in output_errors(result).values():
        assert taken <= plain and taken < searched
    frozen = Freeze().run(result).program
    assert hashes(frozen) == hashes(result)


@pytest.mark.parametrize("bits", [2, 3, 7, 8])
def test_every_width(bits: int) -> None:
    result = CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=0.0).run(
        fake(net(), mixed(0), bits=bits)
    )
    for fqn, weight in frozen_weights(result.program).items():
        check_frozen(weight, fqn, where="test")
        plain, _, taken = output_errors(result.program)[fqn]
        assert 0 < taken < 0.8 * plain


def test_signed_specs_have_negative_scales() -> None:
    unsigned, signed = (
        CorrectCodes(CALIBRATING, HELD_OUT, asymmetric=0.0).run(
            fake(net(), mixed(0), bits=2, signed=signed)
        )
        for signed in (False, True)
    )
    for fqn, weight in frozen_weights(signed.program).items():
        check_frozen(weight, fqn, where="test")
        assert (weight.scales < 0).float().mean() > 0.2
        assert output_errors(signed.program)[fqn][2] < output_errors(unsigned.program)[fqn][2]
    assert hashes(Freeze().run(signed.program).program) == hashes(signed.program)


def test_inputs_that_are_quantized_are_calibrated_on_as_they_are() -> None:
    """w4a4 of a layer: H is that of the values on their grid."""
    rule = Recipe.from_dict(
        {"name": "test", "weights": {"decoder": {"group_size": 32}}, "activations": {"decoder": {}}}
    )
    rule = rule.model_copy(
        update={
            "activations": {"decoder": rule.activations["decoder"].model_copy(update={"bits": 4})}
        }
    )
    model = tiny_llava(num_hidden_layers=1)
    samples = prompts(model, "what is this ?", LONG)
    program = run_passes(
        capture(model),
        [
            *parse_pipeline("analyze-modality"),
            PlanQuantization(recipe=rule),
            InsertObservers(samples),
            InsertFakeQuant(),
        ],
    ).program
    result = CorrectCodes(samples).run(program).program
    first = fused_sets(program)[0]
    assert first.x.target == FAKE_QUANTIZE_ACTIVATION
    stream = Stream(program, samples, [first.x])
    stream.advance(first.x)
    x = torch.cat([stream.value(first.x, number).flatten(0, 1) for number in range(2)])
    (source,) = {node for node in first.x.all_input_nodes if node.op != "get_attr"}
    assert len(x.unique()) <= 16 < len(samples[0]["input_ids"][0]) * 64, source
    moments = moments_of(x)
    factored = factor(moments)
    assert factored is not None
    for fqn, one in first.weights.items():
        scales = quant.search_scales(one.weight, 4, 32, importance=importance(moments.diagonal()))
        codes = corrected_codes(one.weight, scales, 4, 32, factored)
        check(frozen_weights(result)[fqn], codes, scales)
    frozen = Freeze().run(result).program
    inputs = program.example_inputs
    assert torch.equal(frozen(**inputs)[0], result(**inputs)[0])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(nn.functional.silu(self.linear(x)))
        return y


def test_a_module_that_is_called_twice_has_one_weight() -> None:
    torch.manual_seed(0)
    program = fake(Twice().eval(), mixed(0))
    assert sum(1 for _ in program.nodes(FAKE_QUANTIZE)) == 2
    result = CorrectCodes(CALIBRATING, HELD_OUT).run(program)
    assert "codes of 1 weights corrected on 5 samples" in result.notes
    nodes = list(result.program.nodes(DEQUANTIZE))
    assert len(nodes) == 2 and len({node.args[0].target for node in nodes}) == 1
    frozen = Freeze().run(result.program).program
    (weight,) = frozen_weights(frozen).values()
    twice = Twice()
    twice.linear.weight.data = weight.dequantize()
    twice.linear.bias.data = program.tensor("linear.bias").detach()
    with torch.no_grad():
        assert torch.equal(frozen(x=mixed(3))[0], twice(mixed(3)))
    check_contract(CorrectCodes(CALIBRATING), program)


def test_a_head_is_corrected_and_the_embedding_is_left() -> None:
    model = tiny_llava(num_hidden_layers=1)
    rule = Recipe.from_dict({"name": "test", "weights": {"head": {"group_size": 32}}})
    passes = [*parse_pipeline("analyze-modality"), PlanQuantization(recipe=rule)]
    start = run_passes(capture(model), [*passes, InsertFakeQuant()]).program
    corrected = CorrectCodes(prompts(model, LONG)).run(start).program
    assert set(frozen_weights(corrected)) == {"lm_head.weight"}
    (target,) = (t for t, names in corrected.fqns.items() if "embed_tokens" in names[0])
    assert torch.equal(corrected.tensor(target), model.get_input_embeddings().weight)
    check_contract(CorrectCodes(prompts(model, LONG)), start)


def test_of_a_tied_head_the_decoder_is_corrected(block: Any, after_block: After) -> None:
    start = whole(after_block, {part: {"group_size": 32} for part in ("decoder", "head")})
    found = hashes(CorrectCodes(prompts(block, LONG)).run(start).program)
    assert len(found) == 7 and not any("head" in fqn or "embed" in fqn for fqn in found)


def test_bfloat16() -> None:
    model = tiny_llava(dtype=torch.bfloat16, num_hidden_layers=1)
    start = run_passes(capture(model), parse_pipeline(FAKE)).program
    samples = prompts(model, LONG, "what is this ?")
    result = CorrectCodes(samples[:1], samples[1:]).run(start).program
    for plain, _, taken in output_errors(result).values():
        assert 0 < taken <= plain
    frozen = Freeze().run(result).program
    inputs = start.example_inputs
    found = frozen(**inputs)[0]
    assert found.dtype == torch.bfloat16 and torch.equal(found, result(**inputs)[0])


@pytest.fixture(scope="module")
def experts() -> Program:
    model = tiny_experts("llava_mixtral", layers=1)
    return run_passes(capture(model), parse_pipeline(FAKE)).program


def test_each_expert_is_corrected_on_its_own_tokens(experts: Program) -> None:
    result = CorrectCodes().run(experts)
    weights = frozen_weights(result.program)
    up = next(one for one in fused_sets(experts) if "gate_up" in next(iter(one.weights)))
    assert up.parts == EXPERTS
    # What is before it is quantized already when it is its turn.
    stream = Stream(result.program, [experts.example_inputs], [])
    found = {node.name: node for node in result.program.graph.nodes}
    x, chosen = (found[node.name] for node in up.watched)
    stream = Stream(result.program, [experts.example_inputs], [x, chosen])
    stream.advance(x)
    stream.advance(chosen)
    rows, numbers = stream.value(x, 0), stream.value(chosen, 0)
    ((fqn, one),) = up.weights.items()
    for expert, weight in enumerate(one.weight.chunk(EXPERTS)):
        moments = moments_of(rows[numbers == expert])
        factored = factor(moments)
        assert factored is not None
        group = weights[fqn].group_size
        counts = importance(moments.diagonal())
        signed = weights[fqn].spec.signed
        scales = quant.search_scales(weight, 4, group, signed=signed, importance=counts)
        codes = corrected_codes(weight, scales, 4, group, factored)
        check(weights[fqn].matrices()[expert], codes, scales)
    frozen = Freeze().run(result.program).program
    assert hashes(frozen) == hashes(result.program)


def test_experts_that_no_sample_asks_are_said(experts: Program) -> None:
    one = {name: experts.example_inputs[name][:1, -1:] for name in ("input_ids", "attention_mask")}
    result = CorrectCodes([one]).run(experts)
    assert any("2 of 4 matrices saw no sample" in note for note in result.notes)
    for fqn, weight in frozen_weights(result.program).items():
        check_frozen(weight, fqn, where="test")


def test_of_too_many_matrices_all_share_their_moments(
    experts: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correct_codes_, "MOMENTS_OF_PARTS", EXPERTS * 64 * 64 - 1)
    apart = CorrectCodes()
    result = apart.run(experts)
    told = [note for note in result.notes if "its 4 matrices share their second moments" in note]
    assert len(told) == 2 and all("experts" in note for note in told)
    for plain, _, taken in output_errors(result.program).values():
        assert taken <= plain


class Given(nn.Module):
    """A module whose input is called x."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def test_some_matrices_of_a_weight_may_be_rounded() -> None:
    """Half of the channels are held out as they were seen; of the others, those that were not."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=2, bias=False)
    with torch.no_grad():
        conv.weight[4:, 1:] *= 4  # so that scales for the first of them cut these
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(9, 8, 8, 8, generator=generator)
    other = seen.clone()
    seen[:, 5:] = other[:, 4] = 0
    program = fake(Given(conv), seen, granularity="per_channel")
    result = CorrectCodes([{"x": seen}], [{"x": other}]).run(program)
    (conv,) = result.program.nodes(part="module")
    assert annotation(conv)["codes"] == "partly"
    why = "nothing better was found on held-out inputs"
    assert f"conv.weight: some of its matrices rounded, {why}" in result.notes


def test_groups_of_a_convolution_are_corrected_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator)
    images = [
        torch.einsum("oc,bchw->bohw", mixing, torch.randn(4, 3, 16, 16, generator=generator))
        for _ in range(4)
    ]
    start = fake(conv_net(), images[0], granularity="per_channel")
    samples = [{"x": image} for image in images]
    result = CorrectCodes(samples[:3], samples[3:]).run(start)
    errors = output_errors(result.program)
    assert set(errors) == {"first.weight", "depthwise.weight", "second.weight", "head.weight"}
    for plain, _, taken in errors.values():
        assert taken < 0.9 * plain
    assert hashes(Freeze().run(result.program).program) == hashes(result.program)


class Kept:
    """Keeps the weights of every set, as an interrupted run does."""

    def __init__(self) -> None:
        self.sets: dict[tuple[str, int], dict[str, Corrected]] = {}
        self.asked = 0

    def kept(self, run: str, number: int) -> dict[str, Corrected] | None:
        self.asked += 1
        return self.sets.get((run, number))

    def keep(self, run: str, number: int, of: int, weights: Mapping[str, Corrected]) -> None:
        assert of == 2
        self.sets[run, number] = dict(weights)


def test_sets_that_were_kept_are_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    program, progress = fake(net(), mixed(0), bits=3), Kept()
    whole = CorrectCodes(CALIBRATING, HELD_OUT, progress=progress).run(program).program
    assert set(progress.sets) == {(run, n) for run in ("1", "0.25", "0") for n in range(2)}
    for name in [key for key in progress.sets if key[1] == 1]:
        del progress.sets[name]
    solved: list[str] = []
    solve = correct_codes_._Run._solve

    def counted(run: Any, one: Any, *streams: Any) -> dict[str, Corrected]:
        solved.extend(one.weights)
        return solve(run, one, *streams)

    monkeypatch.setattr(correct_codes_._Run, "_solve", counted)
    again = CorrectCodes(CALIBRATING, HELD_OUT, progress=progress).run(program).program
    assert solved == 3 * ["second.weight", "third.weight"]
    assert hashes(again) == hashes(whole)


def test_inputs_that_are_always_0_are_no_error() -> None:
    nothing = [{"x": torch.zeros(5, 64)}]
    result = CorrectCodes(nothing).run(fake(net(), mixed(0)))
    assert not any("factor" in note for note in result.notes)
    assert output_errors(result.program)["first.weight"] == (0, 0, 0)
    found = frozen_weights(result.program)["first.weight"]
    assert torch.equal(found.codes, quant.quantize(net().first.weight, found.scales, 4, 32))


def test_without_samples_it_says_what_it_did(after_block: After) -> None:
    notes = CorrectCodes().run(after_block(FAKE)).notes
    assert "calibrated on the EXAMPLE inputs only" in notes


def test_refusals(captured: Program, after: After) -> None:
    with pytest.raises(PassError, match="nothing is fake-quantized; run insert-fake-quant first"):
        CorrectCodes().run(after("analyze-modality,plan-quantization"))
    with pytest.raises(PassError, match="unknown order 'by-name'; use activation or natural"):
        CorrectCodes(order="by-name").run(after(FAKE))
