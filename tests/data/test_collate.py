"""Batches: what is put into one, what cannot be, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.normalizers import Replace
from torch import nn

from gracec.data.collate import Collator, EmptyBatch
from gracec.data.conversations import BrokenSample, Sample, open_train_data
from gracec.data.prompts import encode_questions
from gracec.data.records import Turn
from gracec.errors import GracecError, GracecWarning
from tests.data.collators import ENDLESS, ONE, TEMPLATE, TWO, answers, collator, model, sample
from tests.data.conversations import record, talk, write
from tests.tiny import tiny_image, tiny_processor
from tests.tiny_families import tiny_processor as tiny_processor_of


@pytest.mark.parametrize("template", [TEMPLATE, ENDLESS, None])
def test_what_comes_before_the_answer_is_what_evaluation_asks(template: str | None) -> None:
    collate = collator(template)
    batch = collate([ONE])
    asked = encode_questions(collate.processor, ["what is this ?"], list(ONE.images))
    before = int((batch["labels"][0] == -100).sum())
    assert batch["input_ids"][0, :before].tolist() == asked["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_the_model_can_be_trained_on_a_batch() -> None:
    batch = collator()([ONE, TWO])
    loss = model()(**batch).loss
    assert torch.isfinite(loss)


def test_an_answer_without_tokens_breaks_the_sample() -> None:
    for turns in (("<image> what ?", "nothing"), ("<image> what ?", "nothing", "why ?", "no")):
        endless = collator(ENDLESS)
        endless.processor.tokenizer.backend_tokenizer.normalizer = Replace("nothing", "")
        with pytest.warns(
            GracecWarning, match="a.jsonl:7: the tokenizer knows no token for an answ"
        ):
            batch = endless([sample(*turns, where="a.jsonl:7"), ONE])
        assert len(batch["labels"]) == 1


def test_a_template_that_refuses_a_sample_breaks_it() -> None:
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    bad = Sample((Turn("system", "be short"), *ONE.turns), ONE.images, "a.jsonl:9")
    message = r"a.jsonl:9: the processor refuses .*no system\)"
    with pytest.warns(GracecWarning, match=message):
        batch = collator(guard + TEMPLATE)([ONE, bad])
    assert len(batch["labels"]) == 1
    with pytest.warns(GracecWarning, match=message), pytest.raises(EmptyBatch, match=message):
        collator(guard + TEMPLATE)([bad])
    with pytest.raises(GracecError, match=message):
        collator(guard + TEMPLATE, strict=True)([ONE, bad])


def test_a_picture_that_the_processor_refuses_breaks_its_sample_alone() -> None:
    collate = Collator(tiny_processor_of("qwen2_vl"), model())
    long = Sample(ONE.turns, (tiny_image(size=(4000, 10)),), "a.jsonl:7")
    with pytest.warns(GracecWarning, match="a.jsonl:7: the processor refuses .*aspect ratio"):
        batch = collate([ONE, long])
    alone = collate([ONE])
    assert all(torch.equal(batch[name], alone[name]) for name in alone)
    assert len(collate.problems) == 1


@pytest.mark.parametrize(
    "bad",
    [
        sample("<image> what ?", "red </s> blue", where="a.jsonl:7"),
        sample("<image> what <pad> ?", "red", where="a.jsonl:7"),
    ],
)
def test_control_tokens_in_a_text_break_the_sample(bad: Sample) -> None:
    collate = collator()
    with pytest.warns(GracecWarning, match="a control token"):
        batch = collate([bad, ONE])
    assert len(batch["labels"]) == 1 and len(batch["pixel_values"]) == 1
    assert collate.problems[0].startswith("a.jsonl:7: the text has '<")
    assert len(collate.problems) == 1
    with pytest.raises(GracecError, match="a.jsonl:7: .*control token"):
        collator(strict=True)([bad, ONE])


def test_broken_samples_are_left_out_of_the_batch() -> None:
    collate = collator()
    broken = BrokenSample("a.jsonl:2", "corrupt image", "cannot be decoded")
    batch = collate([broken, ONE, broken])
    alone = collate([ONE])
    assert batch.keys() == alone.keys()
    assert all(torch.equal(batch[name], alone[name]) for name in alone)
    assert collate.problems == []  # the data reports them
    with pytest.raises(EmptyBatch, match="a.jsonl:2: broken samples leave nothing"):
        collate([broken])
    assert "pixel_values" not in collate([broken, sample("yes or no ?", "no")])


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_batch_without_a_picture_is_as_good_as_another(template: str | None) -> None:
    text = sample("yes or no ?", "no", "sure ?", "yes")
    collate = collator(template)
    batch, mixed = collate([text]), collate([ONE, text])
    assert "pixel_values" not in batch and len(mixed["pixel_values"]) == 1
    assert answers(collate.processor, batch, 0) == ["no </s>", "yes </s>"]
    length = len(batch["labels"][0])
    for name in ("input_ids", "labels"):
        assert torch.equal(mixed[name][1, :length], batch[name][0])
    assert torch.isfinite(model()(**batch).loss)
    with pytest.raises(GracecError, match="a batch needs a sample"):
        collate([])


def test_texts_for_paligemma_whose_processor_takes_none_alone() -> None:
    collate = Collator(tiny_processor_of("paligemma"), model())
    text = sample("yes or no ?", "no")
    alone, mixed = collate([text]), collate([ONE, text])
    assert (
        answers(collate.processor, alone, 0) == answers(collate.processor, mixed, 1) == ["no </s>"]
    )
    assert alone.keys() == mixed.keys() - {"pixel_values"}


def test_truncation_that_leaves_no_answer_breaks_the_sample() -> None:
    first = int(torch.nonzero(collator()([TWO])["labels"][0] != -100)[0])
    collate = collator(max_length=first)
    short = sample("<image> ?", "no", where="a.jsonl:3")
    with pytest.warns(GracecWarning, match=f"max_length {first} leaves no token of an answer"):
        batch = collate([TWO, short])
    assert answers(collate.processor, batch, 0) == ["no </s>"]
    assert len(batch["pixel_values"]) == 1
    assert len(collate.problems) == 1 and collate.problems[0].startswith("a.jsonl:1: ")
    with pytest.raises(GracecError, match="a.jsonl:1: max_length"):
        collator(max_length=first, strict=True)([TWO, short])


def test_processors_that_cannot_be_used() -> None:
    class Bare:
        tokenizer = None

    with pytest.raises(GracecError, match="Bare: has no tokenizer"):
        Collator(Bare(), model())
    with pytest.raises(GracecError, match="max_length must be at least 1"):
        collator(max_length=0)
    processor: Any = tiny_processor()
    processor.image_token = None
    with pytest.raises(GracecError, match="has no image token"):
        Collator(processor, model())
    processor = tiny_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(GracecError, match="neither the model nor the tokenizer has an end-of"):
        Collator(processor, nn.Linear(1, 1))


def test_a_tokenizer_without_a_padding_token_pads_with_one_that_is_masked() -> None:
    with_one, without = collator(), collator()
    without.processor.tokenizer.pad_token = None
    expected, found = with_one([ONE, TWO]), without([ONE, TWO])
    real = expected["attention_mask"].bool()
    assert not real.all() and torch.equal(found["attention_mask"].bool(), real)
    assert (found["input_ids"][~real] == without.processor.tokenizer.eos_token_id).all()
    assert torch.equal(found["input_ids"][real], expected["input_ids"][real])
    assert torch.equal(found["labels"], expected["labels"])
    assert without.processor.tokenizer.pad_token is None
    assert with_one.notes == [] and "'</s>' pads, and is masked" in without.notes[0]


def test_from_file_to_batch(tmp_path: Path) -> None:
    data = open_train_data(write(tmp_path, record(), {"conversations": talk("no ?", "yes")}))
    collate = collator()
    batch = collate([data.sample(index) for index in range(len(data))])
    assert [answers(collate.processor, batch, row) for row in (0, 1)] == [
        ["red </s>"],
        ["yes </s>"],
    ]


QUESTION = sample("<image>\nwhat is this ?")


@pytest.mark.parametrize("template", [TEMPLATE, ENDLESS, None])
def test_a_question_alone_is_what_evaluation_asks(template: str | None) -> None:
    collate = collator(template)
    batch = collate.unlabelled(QUESTION)
    asked = encode_questions(collate.processor, ["what is this ?"], list(QUESTION.images))
    assert batch["input_ids"].tolist() == asked["input_ids"].tolist()
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])
    assert (batch["labels"] == -100).all() and batch["attention_mask"].all()


def test_an_answered_sample_may_be_read_without_labels() -> None:
    batch, labelled = collator().unlabelled(ONE), collator()([ONE])
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], labelled["input_ids"][:, :length])
    assert (batch["labels"] == -100).all()


def test_several_samples_without_labels_are_padded_on_the_right() -> None:
    """Where one of them has an answer, none asks for its own: the template does so for all."""
    collate = collator()
    bad = sample("<image>\nwhat is </s> ?", where="a.jsonl:3")
    with pytest.warns(GracecWarning, match="a control token"):
        batch = collate.unlabelled(QUESTION, bad, ONE)
    asked, answered = collate.unlabelled(QUESTION), collate.unlabelled(ONE)
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    rows = [ids[real.bool()] for ids, real in pairs]
    assert torch.equal(rows[1], answered["input_ids"][0])
    assert torch.equal(rows[0], asked["input_ids"][0, : len(rows[0])])
    assert len(rows[0]) < asked["input_ids"].shape[1]
    assert batch["pixel_values"].shape[0] == len(QUESTION.images) + len(ONE.images)
    assert (batch["labels"] == -100).all()
    both = collate.unlabelled(QUESTION, QUESTION)["input_ids"]
    assert all(torch.equal(row, asked["input_ids"][0]) for row in both)


def test_what_cannot_be_read_without_labels_either() -> None:
    collate = collator()
    bad = sample("<image>\nwhat is </s> ?", where="a.jsonl:3")
    reason = "a.jsonl:3: the text has '</s>', a control token"
    with pytest.warns(GracecWarning, match=reason), pytest.raises(EmptyBatch, match=reason):
        collate.unlabelled(bad)
    with pytest.raises(EmptyBatch):
        collate.unlabelled(BrokenSample("a.jsonl:4", "kind", "reason"))
    with pytest.raises(GracecError, match="a.jsonl:3: the text has"):
        collator(strict=True).unlabelled(bad)
    assert collator(max_length=24).unlabelled(QUESTION)["input_ids"].shape == (1, 24)
    with pytest.raises(GracecError, match="max_length 8 cuts off a part of a picture"):
        collator(max_length=8).unlabelled(QUESTION)
