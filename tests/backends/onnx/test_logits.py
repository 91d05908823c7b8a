"""Settings that change a greedy answer: the tokens are those of `generate` in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from gracec.backends.onnx.logits import DONE, HARMLESS, settings_in_use, settings_not_done
from gracec.backends.onnx.runner import OnnxModel
from gracec.compiled import CompiledModel

END = 2


def settings(free: Tensor) -> dict[str, dict[str, Any]]:
    """What would change the tokens [T] of an answer that is free."""
    first, second = free[0].item(), free[1].item()
    return {
        "repetition_penalty": {"repetition_penalty": 5.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "bad_words_ids": {"bad_words_ids": [[first], [first, second]]},
        "min_length": {"min_length": 60, "eos_token_id": first},
        "min_new_tokens": {"min_new_tokens": 3, "eos_token_id": first},
        "suppress_tokens": {"suppress_tokens": [first]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
    }


@pytest.mark.parametrize("name", DONE)
def test_tokens_are_those_of_transformers(
    name: str,
    model: OnnxModel,
    reference: Any,
    batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "generation_config", GenerationConfig(pad_token_id=0))
    free = model.generate(**batch, max_new_tokens=6)
    changed = settings(free[0, -6:])[name]
    config = GenerationConfig(pad_token_id=0, max_new_tokens=6, **changed)
    assert settings_in_use(config) == [name]
    expected = reference.generate(**batch, generation_config=config)
    monkeypatch.setattr(model, "generation_config", config)
    assert torch.equal(model.generate(**batch), expected)
    assert not torch.equal(free[:, : expected.shape[1]], expected)
    assert not settings_not_done(config)


def test_what_a_generation_config_is_made_with_does_nothing() -> None:
    assert settings_in_use(GenerationConfig()) == []
    assert list(DONE) == [name for name in HARMLESS if name in DONE]


def test_what_is_not_done_is_told_when_the_graphs_are_written(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compiled.frozen.generation_config
    monkeypatch.setattr(config, "forced_eos_token_id", END)
    notes = compiled.export_onnx(tmp_path / "out")
    assert any("sets forced_eos_token_id: the ONNX runner refuses" in note for note in notes)
