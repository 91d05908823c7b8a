"""Samples of a training: conversations for their answers, or whatever is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gracec.data.conversations import TrainData
from gracec.data.text import WINDOW, TextWindows
from gracec.errors import GracecError
from gracec.recipe import Training
from gracec.training.samples import Samples, open_samples, positions_of
from tests.data.collators import collator
from tests.tiny import tiny_image, tiny_llava

WORDS = ("red", "green", "blue", "yellow")
TALKS = [
    {"image": tiny_image(number), "question": f"what is {word} ?", "answer": word}
    for number, word in enumerate(WORDS)
]
ASKED = [{key: talk[key] for key in ("image", "question")} for talk in TALKS]
TEXTS = [{"text": "there is a small red circle in the image . " * 40} for _ in range(4)]


def opened(train_data: Any, eval_data: Any = None, *, max_length: int | None = None, **rule: Any):
    training = Training.model_validate({"held_out": 0.25, "cross_entropy": 1, **rule})
    return open_samples(train_data, eval_data, training, collator(max_length=max_length))


def test_answers_are_labelled() -> None:
    one, held_out = opened(TALKS)
    assert (len(one), len(held_out)) == (3, 1)
    batch = one.batch([0, 2])
    assert batch["labels"].shape == batch["input_ids"].shape and (batch["labels"] >= 0).any()


def test_where_every_token_counts_nothing_has_to_be_answered() -> None:
    for records in (TALKS, ASKED):
        one, held_out = opened(records, labels="all")
        batch = one.batch([0, 2])
        assert isinstance(one.data, TrainData) and len(held_out) == 1
        assert (batch["labels"] == -100).all() and batch["pixel_values"].shape[0] == 2
    with pytest.raises(GracecError, match="more than half of the 4 samples are broken"):
        opened(ASKED)


def test_plain_text_comes_in_windows_that_the_model_has_positions_for() -> None:
    one, held_out = opened(TEXTS, labels="all")
    assert isinstance(one.data, TextWindows) and isinstance(held_out.data, TextWindows)
    shape = one.batch([0, 1])["input_ids"].shape
    assert shape == (2, min(WINDOW, positions_of(tiny_llava()))) == (2, 256)
    together = {tuple(row.tolist()) for part in (one, held_out) for row in part.data.tokens}
    assert len(one) + len(held_out) >= len(together)
    short, _ = opened(TEXTS, labels="all", max_length=32)
    assert short.batch([0])["input_ids"].shape == (1, 32)
    with pytest.raises(GracecError, match="plain text has no answers to learn"):
        opened(TEXTS)


def test_what_chooses_may_be_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the cross is yellow or green . " * 60)
    one, held_out = opened(TALKS, tmp_path / "notes.txt", labels="all")
    assert isinstance(one.data, TrainData) and len(one) == len(TALKS)
    assert isinstance(held_out.data, TextWindows)
    assert isinstance(held_out, Samples) and torch.is_tensor(held_out.batch([0])["input_ids"])
