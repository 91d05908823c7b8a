"""Which weights are one: what the tensors say, in every file that is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.capture.eager import eager_logits
from gracec.errors import GateError, GracecError
from gracec.gates import logit_agreement
from gracec.models.loading import load_model
from gracec.models.surgery import names_of_one
from gracec.models.ties import say_what_is_tied
from gracec.recipe import Recipe
from tests.tiny import tiny_llava, tiny_processor

WEIGHTS = {"decoder": {"group_size": 32}}
RECIPE = Recipe.from_dict({"name": "ties", "weights": WEIGHTS, "deploy": {"dtype": "float32"}})
HEAD, TABLE = "lm_head.weight", "model.language_model.embed_tokens.weight"


def other_head() -> nn.Parameter:
    drawn = torch.randn(128, 64, generator=torch.Generator().manual_seed(7))
    return nn.Parameter(drawn * 0.12)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint with a head of its own, whose configuration ties it to the embedding."""
    path = tmp_path / "model"
    tiny_llava(tie=True).save_pretrained(path)
    tiny_processor().save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    assert not any(name.endswith("lm_head.weight") for name in tensors)
    save_file({**tensors, "lm_head.weight": other_head().data}, file, metadata={"format": "pt"})
    return path


def with_other_head() -> LlavaForConditionalGeneration:
    model = tiny_llava(tie=True)
    model.lm_head.weight = other_head()
    return model


@pytest.mark.parametrize("given", ["a directory", "in place"])
def test_a_head_that_is_not_tied_any_more_stays_apart(
    given: str, directory: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_model(directory)
    assert torch.equal(model.lm_head.weight, other_head())  # transformers keeps them apart
    expected = eager_logits(model, batch)
    compiled = gracec.compile(
        directory if given == "a directory" else with_other_head(),
        RECIPE,
        output_dir=tmp_path / "out",
        processor=tiny_processor(),
        formats=("hf", "onnx") if given == "a directory" else (),
        inplace=given == "in place",
    )
    logits, mask = compiled(**batch).logits, batch["attention_mask"]
    assert logit_agreement(expected, logits, mask).kl < 0.1
    assert f"{HEAD}: the tensors and the configuration differ" in str(compiled.report.notes)
    loaded = gracec.load(tmp_path / "out", "torchao")
    assert torch.equal(loaded(**batch).logits, logits)
    assert torch.equal(loaded.model.lm_head.weight, other_head())
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not fields["tie_word_embeddings"]
    if given == "a directory":
        onnx = gracec.load(tmp_path / "out", "onnxruntime")
        assert logit_agreement(logits, onnx(**batch).logits, mask).kl < 1e-4


@pytest.mark.slow
def test_a_head_that_is_tied_by_hand_becomes_two(batch: dict[str, Tensor], tmp_path: Path) -> None:
    """The configuration cannot be made to say it: another reader would have no place for it."""
    model = tiny_llava(tie=False)
    model.lm_head.weight = model.get_input_embeddings().weight
    expected = eager_logits(model, batch)
    compiled = gracec.compile(model, RECIPE, output_dir=tmp_path / "out", formats=())
    assert logit_agreement(expected, compiled(**batch).logits, batch["attention_mask"]).kl < 0.1
    loaded = gracec.load(tmp_path / "out", "torchao")
    assert torch.equal(loaded(**batch).logits, compiled(**batch).logits)
    assert loaded.processor is None  # none was given
    assert model.lm_head.weight is model.get_input_embeddings().weight  # the caller's, as it was


@pytest.mark.parametrize(("tie", "names"), [(True, 1), (False, 0)])
def test_nothing_is_said_of_a_model_that_is_as_configured(tie: bool, names: int) -> None:
    model = tiny_llava(tie=tie)
    assert say_what_is_tied(model) == ()
    assert sum(len(found) > 1 for found in names_of_one(model).values()) == names
    assert model.config.tie_word_embeddings is tie


def test_some_apart_and_some_tied_is_what_no_configuration_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_other_head()
    tied = {HEAD: TABLE, "model.language_model.norm.weight": "model.language_model.norm.weight"}
    monkeypatch.setattr(model, "get_expanded_tied_weights_keys", lambda all_submodels: dict(tied))
    with pytest.raises(GracecError, match="lm_head.weight is a weight of its own and .*norm"):
        say_what_is_tied(model)


def test_a_source_that_computes_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ties(model: LlavaForConditionalGeneration) -> tuple[str, ...]:
        model.tie_weights()
        return ()

    monkeypatch.setattr("gracec.stages.source.say_what_is_tied", ties)
    with pytest.raises(GateError, match="differ from those of the model that was given by"):
        gracec.compile(with_other_head(), RECIPE)
