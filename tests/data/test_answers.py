"""Answers: where they are in the tokens, where each ends, and what a wrong template says."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gracec.data.answers import Answers, stop_tokens
from gracec.data.collate import Collator
from gracec.data.prompts import Prompts, encode_questions, messages
from gracec.data.records import Broken
from gracec.errors import GracecError
from tests.data.collators import (
    CHATML,
    ENDLESS,
    LLAVA,
    MARKED,
    ONE,
    TEMPLATE,
    TWO,
    UNMARKED,
    Rows,
    answers,
    collator,
    model,
    sample,
    student,
    subwords,
)
from tests.tiny import (
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    PATCH_SIZE,
    tiny_llava,
    tiny_processor,
)


@pytest.mark.parametrize("template", [TEMPLATE, ENDLESS, MARKED, None])
def test_labels_are_the_answers_and_the_last_one_ends(template: str | None) -> None:
    collate = collator(template)
    text = sample("yes or no ?", "no")
    both = sample("<image> <image>\nwhich of the two is red ?", "the left one")
    batch = collate([ONE, text, TWO, both])
    ends = template in (TEMPLATE, None)
    end = " </s>" if ends else ""
    assert answers(collate.processor, batch, 0) == ["red circle </s>"]
    assert answers(collate.processor, batch, 1) == ["no </s>"]
    expected = [f"red circle{end}", f"left of the star .{end}", "one </s>"]
    assert answers(collate.processor, batch, 2) == expected
    assert answers(collate.processor, batch, 3) == ["the left one </s>"]
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    images = (batch["input_ids"] == IMAGE).sum(1).tolist()
    assert images == [count * IMAGE_TOKENS for count in (1, 0, 1, 2)]
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        assert batch["attention_mask"][row, :length].all()  # padded on the right
        assert (batch["input_ids"][row, length:] == PAD).all()
        assert batch["input_ids"][row, length - 1] == EOS
    assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())
    assert collate.problems == []


def test_the_shipped_processor_labels_answer_and_eos() -> None:
    processor: Any = student()
    collate = Collator(processor, model())
    one = sample("<image>\nwhere is the cat ?", "top left")
    many = sample("<image>\nwhere is the cat ?", "top left", "how many animals ?", "cat")
    batch = collate([one, many])
    word = processor.tokenizer.convert_tokens_to_ids
    expected = [*map(word, ["top", "left"]), word("<eos>")]
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == expected
    assert answers(processor, batch, 1) == ["top left <eos>", "cat <eos>"]
    asked = encode_questions(processor, ["where is the cat ?"], list(one.images))["input_ids"][0]
    assert batch["input_ids"][0, : len(asked)].tolist() == asked.tolist()
    assert batch["labels"][0, len(asked) :][:3].tolist() == expected


@pytest.mark.parametrize("template", [LLAVA, UNMARKED, "<s>" + UNMARKED, CHATML, None])
@pytest.mark.parametrize("style", ["byte level", "metaspace", "adds bos"])
def test_tokenizers_that_join_blanks_and_words(template: str | None, style: str) -> None:
    processor: Any = subwords(template or "", style)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [EOS, end] if template == CHATML else [EOS]
    other = nn.Module()
    other.generation_config = SimpleNamespace(eos_token_id=ends)  # type: ignore[assignment]
    batch = Collator(processor, other)([TWO, ONE])
    found = answers(processor, batch, 0)
    last = "<|im_end|>" if template == CHATML else "</s>"
    said = [text.replace("</s>", "").replace("<|im_end|>", "").strip() for text in found]
    assert said == ["red circle", "left of the star .", "one"]
    assert found[-1].strip().removeprefix("one") == last, "no blank between answer and end"
    if template in (CHATML, None):
        assert all(text.endswith(last) for text in found)
    asked = encode_questions(processor, ["what is this ?"], list(ONE.images))["input_ids"][0]
    assert batch["input_ids"][1, : len(asked)].tolist() == asked.tolist()
    assert int(batch["labels"][1, len(asked) - 1]) == -100
    if template != LLAVA:
        assert int(batch["labels"][1, len(asked)]) != -100


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_images_that_become_more_than_image_tokens(template: str | None) -> None:
    base: Any = tiny_processor()
    build: Any = Rows
    rows = build(
        image_processor=base.image_processor,
        tokenizer=base.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    batch = Collator(rows, model())([TWO, sample("no ?", "yes", "<image> what ?", "a star")])
    first = ["red circle </s>", "left of the star . </s>", "one </s>"]
    assert answers(rows, batch, 0) == first
    assert answers(rows, batch, 1) == ["yes </s>", "a star </s>"]


def test_any_stop_token_of_the_model_ends_an_answer() -> None:
    other: Any = tiny_llava()
    processor = tiny_processor(chat_template=TEMPLATE.replace("</s>", "END"))
    processor.tokenizer.add_tokens(["END"])
    end = processor.tokenizer.convert_tokens_to_ids("END")
    other.generation_config.eos_token_id = [end, EOS]
    assert answers(processor, Collator(processor, other)([TWO]), 0) == [
        "red circle END",
        "left of the star . END",
        "one END",
    ]
    other.generation_config.eos_token_id = EOS
    last = answers(processor, Collator(processor, other)([ONE]), 0)
    assert last == ["red circle END </s>"]


def test_the_end_that_is_added_is_the_tokenizers_own() -> None:
    other: Any = tiny_llava()
    other.generation_config.eos_token_id = [PAD, EOS]
    processor = tiny_processor(chat_template=ENDLESS)
    assert answers(processor, Collator(processor, other)([ONE]), 0) == ["red circle </s>"]


def test_an_end_in_the_next_question_does_not_end_an_answer() -> None:
    old, new = "== 'assistant' else '' }}", "== 'user' else '' }}"
    collate = collator(TEMPLATE.replace(old, new))
    found = answers(collate.processor, collate([TWO]), 0)
    assert found == ["red circle", "left of the star .", "one </s>"]


def test_a_prompt_of_other_tokens_is_an_error() -> None:
    """Its text is the same, but its last blank is a token that no conversation has."""
    processor = subwords(UNMARKED.replace("'ASSISTANT:'", "'ASSISTANT: '"), "metaspace")
    with pytest.raises(GracecError, match="a.jsonl:1: the conversation does not begin with the pr"):
        Collator(processor, model())([ONE])


def test_a_prompt_that_the_conversation_does_not_begin_with_is_an_error() -> None:
    with pytest.raises(GracecError, match="a.jsonl:1: the conversation does not begin with the pr"):
        collator(CHAT_TEMPLATE.replace("{{ '<s> ASSISTANT : ' }}", "{{ 'ASSISTANT :' }}"))([ONE])


def test_a_turn_that_is_written_otherwise_later_is_an_error() -> None:
    last = "{{ '</s> ' if message['role'] == 'assistant' and loop.last else '' }}"
    template = TEMPLATE.replace("{{ '</s> ' if message['role'] == 'assistant' else '' }}", last)
    collate = collator(template)
    assert answers(collate.processor, collate([ONE]), 0) == ["red circle </s>"]
    with pytest.raises(GracecError, match="a.jsonl:1: the chat template writes answer 1 otherwise"):
        collate([TWO])


def test_marks_that_are_not_around_every_answer_are_an_error() -> None:
    marked = MARKED.replace("message['role'] == 'assistant'", "part['text'] == 'red circle'")
    with pytest.raises(GracecError, match="a.jsonl:1: the chat template marks 1 answers of 3"):
        collator(marked)([TWO])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'<image> ' if", "'' if", "no place|0 places|refuses|the text has no place"),
        ("'<image> ' if", "'<image> <image> ' if", "2 places for 1 images|refuses it"),
    ],
)
def test_a_template_that_miscounts_pictures_is_an_error(old: str, new: str, message: str) -> None:
    assert old in TEMPLATE
    with pytest.raises(GracecError, match=message) as caught:
        collator(TEMPLATE.replace(old, new), strict=True)([ONE])
    assert str(caught.value).startswith("a.jsonl:1: ")


def test_truncation() -> None:
    full = collator()([TWO])
    labelled = torch.nonzero(full["labels"][0] != -100).flatten().tolist()
    cut = labelled[3] + 2  # inside the second answer
    batch = collator(max_length=cut)([TWO])
    assert all(torch.equal(batch[name], full[name][:, :cut]) for name in full if "pix" not in name)
    assert answers(collator().processor, batch, 0) == ["red circle </s>", "left of"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = collator(max_length=full["labels"].shape[1])([TWO])
    assert torch.equal(exact["labels"], full["labels"])


def test_truncation_inside_a_picture_is_an_error() -> None:
    late = sample("is it red ?", "yes", "<image> and this ?", "no", where="a.jsonl:5")
    ids = collator()([late])["input_ids"][0].tolist()
    end = len(ids) - ids[::-1].index(IMAGE)
    collator(max_length=end)([late])
    for length in (end - 1, end - IMAGE_TOKENS + 1, end - IMAGE_TOKENS):
        with pytest.raises(GracecError, match="a.jsonl:5: max_length .* a part of a picture"):
            collator(max_length=length)([sample("yes or no ?", "no"), late])


def test_a_template_that_refuses_the_prompt_for_an_answer_names_the_sample() -> None:
    guard = "{% if messages[-1]['role'] == 'user' %}{{ raise_exception('say more') }}{% endif %}"
    with pytest.raises(GracecError, match=r"^a.jsonl:1: the processor refuses it \(.*say more\)"):
        collator(guard + TEMPLATE)([ONE])


def test_a_row_is_tokens_and_spans() -> None:
    prompts = Prompts(tiny_processor())
    stops = stop_tokens(model(), prompts.processor)
    assert stops == (EOS,)
    ids = prompts.tokens(prompts.text(messages(TWO.turns)), TWO.images)
    row = Answers(prompts, stops).row(TWO, ids)
    assert row.ids == ids
    said = [prompts.tokenizer.decode(ids[start:end]) for start, end in row.spans]
    assert said == ["red circle </s>", "left of the star . </s>", "one </s>"]
    (first, _), *_ = row.spans
    assert len(Answers(prompts, stops, first + 1).row(TWO, ids).ids) == first + 1
    with pytest.raises(Broken, match=f"max_length {first} leaves no token"):
        Answers(prompts, stops, first).row(TWO, ids)
