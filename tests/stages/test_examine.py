"""examine asks both models and holds the second to what the recipe expects."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from gracec.errors import GateError
from gracec.evaluate import VqaReport, VqaSample
from gracec.evaluate.scores import Prediction, summarise
from gracec.recipe import Expectation, Recipe
from gracec.request import Request
from gracec.stages import examine as stage
from gracec.stages.examine import (
    Exam,
    cost_of_rounding,
    examine_compiled,
    examined,
    rounding_cost,
)
from tests.tiny import tiny_processor

SAMPLES = [VqaSample(Path("never"), "what is this ?", "red", "color")]


def answered(right: int) -> VqaReport:
    """Of 4 questions, the first are answered well."""
    answers = ["red"] * right + ["mauve"] * (4 - right)
    return summarise(
        [Prediction(n, "color", text, "red", text == "red") for n, text in enumerate(answers)]
    )


@pytest.fixture
def request_(llava: LlavaForConditionalGeneration) -> Request:
    expect = Expectation(metric="accuracy_change", at_least=-0.3)
    recipe = Recipe.load("w4a16-ptq").model_copy(update={"expect": expect})
    return Request.checked(llava, recipe, eval_data=SAMPLES, processor=tiny_processor())


@pytest.mark.parametrize(("right", "fails"), [(4, False), (3, False), (2, True), (0, True)])
def test_a_loss_that_the_recipe_does_not_expect_is_a_failure(
    request_: Request, monkeypatch: pytest.MonkeyPatch, right: int, fails: bool
) -> None:
    monkeypatch.setattr(stage, "evaluate_vqa", lambda *arguments: answered(right))
    exam = examine_compiled(Exam(answered(4), {}), None, tiny_processor(), request_)
    assert exam.accuracy["compiled"]["overall"]["accuracy"] == right / 4
    assert (exam.failure is not None) == fails
    if exam.failure is not None:
        assert isinstance(exam.failure, GateError)
        assert "the recipe expects at least -30.00%" in str(exam.failure)


@pytest.mark.parametrize(
    ("rounded", "exact", "cost"),
    [
        (4, 4, ""),
        (4, 3, ""),
        (3, 4, ""),  # one answer of four may be chance
        (0, 4, "accuracy is lower by 100.0 ±0.0 points"),
    ],
)
def test_rounding_costs_what_is_hardly_chance(
    llava: LlavaForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
    rounded: int,
    exact: int,
    cost: str,
) -> None:
    request = Request.checked(llava, "w4a16-ptq", eval_data=SAMPLES, processor=tiny_processor())
    exam = examined(answered(4), answered(exact), request)
    assert exam.failure is None and not exam.lost
    monkeypatch.setattr(stage, "evaluate_vqa", lambda *arguments, **options: answered(rounded))
    assert rounding_cost(exam, request, tiny_processor(), None) == cost
    assert examined(answered(4), answered(rounded), request).lost == bool(cost)


def test_rounding_may_not_cost_what_the_recipe_expects(request_: Request) -> None:
    rounded, exact, low = (examined(answered(4), answered(n), request_) for n in (2, 3, 1))
    assert "the recipe expects at least -30.00%" in cost_of_rounding(rounded, exact)
    assert rounded.lost and not exact.lost
    assert cost_of_rounding(rounded, low) == "", "the codes fail as well"
