"""prepare holds the graph to the model, and says no to what cannot hold the plan."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import gracec
from gracec import gates, quant
from gracec.compiled import CompiledModel
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.ir.program import Program
from gracec.journal import Error, Journal
from gracec.passes import run_passes
from gracec.passes.freeze import DEQUANTIZE, frozen_weights
from gracec.passes.insert_fake_quant import fake_quantized
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant.frozen import code_hash
from gracec.quant.observers import weight_scales
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.stages import prepare as stage
from gracec.stages.freeze import freeze
from gracec.stages.pipelines import Observed, preparing
from gracec.stages.prepare import Prepared, accept, prepare
from gracec.stages.source import Source, load_source
from gracec.targets.torchao import Torchao
from gracec.training.calibration import calibration_data
from tests.tiny import WORDS, tiny_processor

After = Callable[[str], Program]
NORM = "model.model.language_model.norm.weight"
TWO_SIZES = Recipe.from_dict(
    {"name": "two", "weights": {"decoder": {"group_size": 32}, "projector": {"group_size": 64}}}
)

HEAD = Recipe.from_dict(
    {"name": "head", "weights": {"decoder": {"group_size": 32}, "head": {"group_size": 32}}}
)


def request(model: Any, recipe: Any = "w4a16-ptq", **options: Any) -> Request:
    return Request.checked(model, recipe, **options)


@pytest.fixture(scope="module")
def source(llava: LlavaForConditionalGeneration) -> Source:
    return load_source(llava, request(llava), Journal())


@pytest.fixture
def planned(source: Source, after: After) -> Prepared:
    """What AWQ cannot hold: two sizes of groups."""
    planned = PlanQuantization(recipe=TWO_SIZES).run(after("analyze-modality")).program
    return Prepared(source, source.model, planned)


def test_a_graph_that_computes_something_else_than_the_model_is_an_error(
    source: Source, captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = captured.copy()
    wrong.set_tensor(NORM, nn.Parameter(captured.tensor(NORM).detach() * 1.01))
    monkeypatch.setattr(stage, "capture", lambda model: wrong)
    with pytest.raises(GateError, match="captured graph and eager model differ by"):
        prepare(source, request(source.model), Journal())


def test_blocks_that_are_others_are_an_error(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(program: Program, model: object) -> int:
        assert any(program.nodes(role="block_output"))
        raise GateError("not the hidden state")

    monkeypatch.setattr(stage, "blocks_equal_hidden_states", refuse)
    with pytest.raises(GateError, match="not the hidden state"):
        prepare(source, request(source.model), Journal())


def test_what_the_passes_say_is_in_the_journal(
    source: Source, captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "capture", lambda model: captured)
    asked, journal = request(source.model), Journal()
    prepare(source, asked, journal)
    observed, _ = stage.observe(source.model, source, asked)
    assert observed.moments and not observed.samples
    assert tuple(journal.notes) == run_passes(captured, preparing(asked.recipe, observed)).notes
    assert {note.source for note in journal.notes} >= {
        *("plan-quantization", "observe-second-moments", "insert-fake-quant")
    }


def texts(seed: int = 0) -> list[dict[str, str]]:
    chosen = random.Random(seed)
    return [{"text": " ".join(chosen.choices(WORDS, k=300))} for _ in range(4)]


def with_data(model: Any, **options: Any) -> dict[str, Any]:
    """What corrects the codes of a decoder on texts."""
    rule = {"bits": 4, "group_size": 32, "signed": True}
    recipe = Recipe.from_dict({"name": "test", "weights": {"decoder": rule}})
    return {
        "model": model,
        "recipe": recipe,
        "processor": tiny_processor(),
        "train_data": texts(),
        "formats": (),
        "progress": False,
        **options,
    }


@pytest.fixture(scope="module")
def calibrated(block: LlavaForConditionalGeneration) -> CompiledModel:
    return gracec.compile(**with_data(block))


def test_what_data_has_corrected_is_in_the_report(calibrated: CompiledModel) -> None:
    figures: dict[str, Any] = {**calibrated.report.gates}
    assert 0 < figures["output_error"].value < 0.8
    rounded, corrected = figures["rounded_logits"], figures["corrected_logits"]
    assert 0 < corrected.kl < rounded.kl == corrected.bound
    assert "frozen_equals_fake_quantized" in figures
    notes = [str(note) for note in calibrated.report.notes]
    assert any("correct-codes: codes of 7 weights corrected on" in note for note in notes)


def test_codes_are_those_that_were_chosen_and_the_same_every_time(
    block: LlavaForConditionalGeneration, calibrated: CompiledModel
) -> None:
    asked = Request.checked(**with_data(block))
    again = prepare(load_source(block, asked, Journal()), asked, Journal())
    chosen = {fqn: code_hash(weight) for fqn, weight in frozen_weights(again.program).items()}
    found = {fqn: code_hash(weight) for fqn, weight in calibrated.frozen.weights.items()}
    assert chosen == found and len(found) == 7


def test_a_head_that_was_tied_is_corrected(block: LlavaForConditionalGeneration) -> None:
    asked = Request.checked(**with_data(block, recipe=HEAD))
    source = load_source(block, asked, Journal())
    prepared = prepare(source, asked, Journal())
    assert {fqn for fqn in frozen_weights(prepared.program) if "head" in fqn} == {"lm_head.weight"}
    assert not list(fake_quantized(prepared.program))


def test_logits_that_are_worse_than_rounded_ones_are_told_and_an_error_in_strict_mode(
    block: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreement_on = gates.agreement_on

    def worse(program: Program, other: Program, samples: Any) -> Any:
        found = agreement_on(program, other, samples)
        return replace(found, kl=float(any(other.nodes(DEQUANTIZE))))

    monkeypatch.setattr(gates, "agreement_on", worse)
    what = "corrected codes are off by KL 1, plain rounding by 0"
    for strict in (False, True):
        asked, journal = Request.checked(**with_data(block, strict=strict)), Journal()
        source = load_source(block, asked, Journal())
        if strict:
            with pytest.raises(GateError, match=f"{what}; give more samples, or drop strict"):
                prepare(source, asked, journal)
        else:
            prepare(source, asked, journal)
            assert what in [note.text for note in journal.notes]


def test_one_sample_alone_is_compared_with_no_other(block: LlavaForConditionalGeneration) -> None:
    asked = Request.checked(**with_data(block, train_data=[{"text": "what is this ?"}]))
    journal = Journal()
    prepare(load_source(block, asked, Journal()), asked, journal)
    told = [note.text for note in journal.notes]
    assert "one sample alone was given: nothing is compared on others" in told
    assert "output_error" in journal.figures and "corrected_logits" not in journal.figures


def test_a_format_that_cannot_hold_the_plan_is_refused(planned: Prepared, tmp_path: Path) -> None:
    where = {"output_dir": tmp_path / "out"}
    accept(planned, request(planned.model, TWO_SIZES, formats="hf", **where))
    accept(planned, request(planned.model, TWO_SIZES, formats="awq"))  # nothing is saved
    with pytest.raises(GracecError, match="format awq: .*one group size"):
        accept(planned, request(planned.model, TWO_SIZES, formats="hf,awq", **where))


CORRECTED = Recipe.from_dict({"name": "codes", "weights": {"decoder": {"group_size": 32}}})
FIRST = "model.language_model.layers.0.self_attn.q_proj.weight"


def test_output_errors_are_those_on_held_out_inputs(llava: LlavaForConditionalGeneration) -> None:
    """The inputs of the first weight depend on no quantized one: its errors computed again."""
    draw = random.Random(0)
    texts = [{"text": " ".join(draw.choices(WORDS, k=100))} for _ in range(12)]
    asked = request(llava, CORRECTED, train_data=texts, processor=tiny_processor())
    journal = Journal()
    source = load_source(llava, asked, journal)
    frozen = freeze(prepare(source, asked, journal), asked, journal)
    rows = {row.fqns[0]: row for row in journal.plan if row.spec is not None}
    errors = {fqn: row.output_error for fqn, row in rows.items()}
    assert len(errors) == 14 and errors == journal.output_errors
    assert {fqn: row.codes for fqn, row in rows.items()} == journal.codes
    worst = max(row.error_of_plain or 1.0 for row in rows.values())
    assert journal.figures["output_error"] == Error(
        worst, 1.0, "of plain rounding's, on held-out inputs"
    )
    (held,) = calibration_data(llava, asked.recipe, source.processor, texts).drawn().held_out
    decoder = llava.model.language_model
    with torch.no_grad():
        x = decoder.layers[0].input_layernorm(decoder.embed_tokens(held["input_ids"])).flatten(0, 1)
    weight, spec = llava.get_parameter(FIRST).detach(), frozen.weights[FIRST].spec
    scales = weight_scales(weight, spec, "min_max")
    codes = quant.quantize(weight, scales, spec.bits, spec.group_size)
    plain = quant.dequantize(codes, scales, spec.group_size)
    compiled = frozen.weights[FIRST].dequantize()
    for quantized, error in ((plain, errors[FIRST][0]), (compiled, errors[FIRST][2])):
        wrong = (x @ (weight - quantized).t()).square().sum() / (x @ weight.t()).square().sum()
        assert error == pytest.approx(wrong.item(), rel=1e-3)
    assert errors[FIRST][2] < 0.8 * errors[FIRST][0]


def test_what_plain_rounding_does_not_change_has_no_output_error(
    captured: Program, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"a": (0.0, 0.0, 0.0), "b": (0.4, 0.3, 0.1), "c": (float("nan"),) * 3}
    monkeypatch.setattr(stage, "output_errors", lambda program: found)
    journal = Journal()
    stage._compare(captured, captured, Observed(), request(source.model), journal)
    assert journal.output_errors == {"b": (0.4, 0.3, 0.1)}
    figure = journal.figures["output_error"]
    assert str(figure).startswith("0.25 of plain rounding's, on the inputs it was calibrated on")


class Choosy(Torchao):
    """Takes no model whose projector is quantized; its kernels take no weight of a decoder."""

    refuses: ClassVar[bool] = True

    def refusal(self, frozen: Frozen) -> str:
        return "the projector is odd" if self.refuses else ""

    def dense(self, frozen: Frozen) -> dict[str, str]:
        return {fqn: "it is a decoder's" for fqn in frozen.weights if "language_model" in fqn}


class LessChoosy(Choosy):
    refuses: ClassVar[bool] = False


def test_a_target_that_cannot_run_the_plan_is_refused(planned: Prepared) -> None:
    with pytest.raises(GracecError, match="target torchao: the projector is odd"):
        accept(planned, request(planned.model, TWO_SIZES, target=Choosy()))
    accept(planned, request(planned.model, TWO_SIZES, target=LessChoosy()))
    with pytest.raises(GracecError, match="no kernel of torchao takes it: it is a decoder's"):
        accept(planned, request(planned.model, TWO_SIZES, target=LessChoosy(), strict=True))
