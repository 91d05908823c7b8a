"""What is asked of `compile` and cannot be done, or would be ignored, before anything is."""

from pathlib import Path
from typing import Any

import pytest

from gracec.errors import GracecError
from gracec.evaluate import VqaSample
from gracec.recipe import Recipe
from gracec.request import Request

DATA = [{"question": "what ?", "answer": "red"}]
ACTIVATIONS = {"decoder": {"bits": 8}}


def recipe(method: str = "auto", **fields: Any) -> Recipe:
    whole = {"name": "test", "weights": {"decoder": {}}, "calibration": {"method": method}}
    return Recipe.from_dict({**whole, **fields})


def checked(rule: Recipe, **options: Any) -> Request:
    return Request.checked(None, rule, **options)


def refused(rule: Recipe, message: str, **options: Any) -> None:
    with pytest.raises(GracecError) as error:
        checked(rule, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("method", ["auto", "moments", "gptq"])
def test_data_calibrates_a_recipe_that_does_not_train(method: str) -> None:
    request = checked(recipe(method), train_data=DATA)
    assert request.calibrates_weights and request.training is None and request.notes == ()


def test_data_that_nothing_looks_at_is_refused() -> None:
    refused(
        recipe("weights"),
        "recipe test: the recipe looks at the weights alone, so train_data would be ignored; "
        "leave it out, or set calibration.method: auto",
        train_data=DATA,
    )
    refused(
        recipe(weights={}),
        "recipe test: the recipe does not train, so train_data would be ignored; "
        "use a training recipe: w4a16",
        train_data=DATA,
    )
    observed = checked(recipe("weights", activations=ACTIVATIONS), train_data=DATA)
    assert not observed.calibrates_weights
    trained = checked(recipe("weights", training={}), train_data=DATA)
    assert trained.training is not None and not trained.calibrates_weights


@pytest.mark.parametrize("training", [None, {}])
def test_gptq_needs_data(training: dict[str, Any] | None) -> None:
    refused(
        recipe("gptq", training=training),
        "recipe test: calibration.method gptq needs data, and there is no train_data; "
        "give train_data (--data), or use method: moments, which needs none",
    )
    for method in ("auto", "moments", "weights"):
        assert not checked(recipe(method, training=training)).calibrates_weights
    assert checked(recipe("gptq", weights={})).recipe.weights == {}  # nothing has codes


def test_a_training_without_data_is_post_training_quantization() -> None:
    (note,) = checked(recipe(training={})).notes
    assert note.text == "no training data: post-training quantization instead"
    with pytest.raises(GracecError, match="no training data: post-training quantization instead"):
        checked(recipe(training={}), strict=True)
    assert checked(recipe(), strict=True).notes == ()


def test_what_calibrates_on_data_may_be_resumed(tmp_path: Path) -> None:
    out = {"resume": True, "output_dir": tmp_path / "out"}
    assert checked(recipe(), train_data=DATA, **out).resume
    refused(recipe(), "there is nothing to resume without output_dir", train_data=DATA, resume=True)
    ignored = "recipe test: the recipe does not train, so resume would be ignored; "
    ignored += "use a training recipe: w4a16"
    refused(recipe(), ignored, **out)
    observed = recipe("weights", activations=ACTIVATIONS)
    refused(observed, ignored, train_data=DATA, **out)


def test_a_teacher_of_nobody_is_refused() -> None:
    refused(
        recipe(),
        "recipe test: the recipe does not train, so teacher would be ignored; "
        "use a training recipe: w4a16",
        train_data=DATA,
        teacher="teacher",
    )


def test_questions_are_held_out_of_calibration_too() -> None:
    asked = [VqaSample(None, "what is it ?", "red")]
    held = [{"question": "what is it ?", "answer": "red"}]
    for fields in ({}, {"training": {}}):
        request = checked(recipe(**fields), train_data=DATA, eval_data=asked, processor=object())
        assert request.held_out == held
        assert checked(recipe(**fields), train_data=DATA).held_out is None
    refused(
        recipe(),
        "eval_data: eval_data holds no questions, and nothing is trained, so it would be ignored; "
        "give a folder with samples.jsonl",
        train_data=DATA,
        eval_data=DATA,
    )


def test_data_that_is_not_there_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    for name in ("train_data", "eval_data"):
        with pytest.raises(GracecError, match="missing.jsonl: does not exist; give"):
            Request.checked("no model", "w4a16", **{name: str(tmp_path / "missing.jsonl")})
