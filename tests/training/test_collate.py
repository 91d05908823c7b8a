"""Batches: which tokens are labelled, and what cannot be put into one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

from gracec.errors import GracecError, GracecWarning
from gracec.evaluate.vqa import encode
from gracec.training.collate import Collator, EmptyBatch
from gracec.training.data import BrokenSample, Sample, open_train_data
from gracec.training.records import Turn
from tests.tiny import (
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    PATCH_SIZE,
    WORDS,
    tiny_image,
    tiny_llava,
    tiny_processor,
)
from tests.training.conversations import record, said, talk, write

STUDENT = Path(__file__).resolve().parents[2] / "examples/emojivqa/student"
# Each turn begins with <s>; the tests' usual template asks for an answer without it.
TEMPLATE = CHAT_TEMPLATE
ENDLESS = TEMPLATE.replace("{{ '</s> ' if message['role'] == 'assistant' else '' }}", "")
MARKED = (
    "{% for message in messages %}{{ message['role'] | upper + ' : ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}"
    "{% endgeneration %} END{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)


@cache
def model() -> nn.Module:
    return tiny_llava()


@cache
def student() -> LlavaProcessor:
    processor: LlavaProcessor = AutoProcessor.from_pretrained(STUDENT)
    return processor


def collator(template: str | None = TEMPLATE, **more: Any) -> Collator:
    return Collator(tiny_processor(chat_template=template), model(), **more)


def sample(*turns: str, images: int | None = None, where: str = "a.jsonl:1") -> Sample:
    count = sum(turn.count("<image>") for turn in turns) if images is None else images
    return Sample(said(*turns), tuple(tiny_image(seed) for seed in range(count)), where)


ONE = sample("<image>\nwhat is this ?", "red circle")
TWO = sample(
    "<image>\nwhat is this ?",
    "red circle",
    "where is it ?",
    "left of the star .",
    "how many ?",
    "one",
)


def answers(processor: Any, batch: Mapping[str, Tensor], row: int) -> list[str]:
    """The labelled spans of a row as text; that labels equal the tokens is asserted."""
    labels, ids = batch["labels"][row], batch["input_ids"][row]
    assert labels.dtype == torch.int64 and labels.shape == ids.shape
    marked = labels != -100
    assert torch.equal(labels[marked], ids[marked])
    assert not (marked & (batch["attention_mask"][row] == 0)).any()
    assert IMAGE not in labels.tolist()
    spans: list[list[int]] = []
    for at in range(len(ids)):
        if marked[at]:
            if not at or not marked[at - 1]:
                spans.append([])
            spans[-1].append(int(ids[at]))
    return [processor.tokenizer.decode(span) for span in spans]


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


@pytest.mark.parametrize("template", [TEMPLATE, ENDLESS, None])
def test_what_comes_before_the_answer_is_what_evaluation_asks(template: str | None) -> None:
    collate = collator(template)
    batch = collate([ONE])
    asked = encode(collate.processor, ["what is this ?"], list(ONE.images))
    before = int((batch["labels"][0] == -100).sum())
    assert batch["input_ids"][0, :before].tolist() == asked["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


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
    asked = encode(processor, ["where is the cat ?"], list(one.images))["input_ids"][0]
    assert batch["input_ids"][0, : len(asked)].tolist() == asked.tolist()
    assert batch["labels"][0, len(asked) :][:3].tolist() == expected


class Rows(LlavaProcessor):
    """Writes a row mark between rows of an image, as other families do."""

    def replace_image_token(self, image_inputs: Any, image_idx: int, **more: Any) -> str:
        row = IMAGE_SIZE_IN_PATCHES * self.image_token
        return " top ".join([row] * IMAGE_SIZE_IN_PATCHES)


IMAGE_SIZE_IN_PATCHES = int(IMAGE_TOKENS**0.5)

# As llava-hf has it: blanks after every text, no end token, and marks around the answers.
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
UNMARKED = LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def subwords(template: str, style: str) -> LlavaProcessor:
    """A processor whose tokenizer splits words, blanks being a part of what follows them."""
    byte_level = style == "byte level"
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    pre: Any = pre_tokenizers
    tokenizer.pre_tokenizer = (
        pre.ByteLevel(add_prefix_space=False) if byte_level else pre.Metaspace()
    )
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
    corpus = [" ".join(WORDS), "USER: ASSISTANT: user assistant\n", "a red circle. left of it."] * 3
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if style == "adds bos":
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    build: Any = PreTrainedTokenizerFast
    processor: Any = tiny_processor(chat_template=template)
    processor.tokenizer = build(
        tokenizer_object=tokenizer, additional_special_tokens=special[4:], **names
    )
    return cast(LlavaProcessor, processor)


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
    asked = encode(processor, ["what is this ?"], list(ONE.images))["input_ids"][0].tolist()
    assert batch["input_ids"][1, : len(asked)].tolist() == asked
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


def test_the_model_can_be_trained_on_a_batch() -> None:
    batch = collator()([ONE, TWO])
    loss = model()(**batch).loss
    assert torch.isfinite(loss)


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


def test_an_answer_without_tokens_breaks_the_sample() -> None:
    for turns in (("<image> what ?", "nothing"), ("<image> what ?", "nothing", "why ?", "no")):
        endless = collator(ENDLESS)
        endless.processor.tokenizer.backend_tokenizer.normalizer = Replace("nothing", "")
        with pytest.warns(
            GracecWarning, match="a.jsonl:7: the tokenizer knows no token for an answ"
        ):
            batch = endless([sample(*turns, where="a.jsonl:7"), ONE])
        assert len(batch["labels"]) == 1


def test_marks_that_are_not_around_every_answer_are_an_error() -> None:
    marked = MARKED.replace("message['role'] == 'assistant'", "part['text'] == 'red circle'")
    with pytest.raises(GracecError, match="a.jsonl:1: the chat template marks 1 answers of 3"):
        collator(marked)([TWO])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'<image> ' if", "'' if", "no place|0 places|refuses|the text has no place"),
        ("'<image> ' if", "'<image> <image> ' if", "2 places for 1 images|refuses the sample"),
    ],
)
def test_a_template_that_miscounts_pictures_is_an_error(old: str, new: str, message: str) -> None:
    assert old in TEMPLATE
    with pytest.raises(GracecError, match=message) as caught:
        collator(TEMPLATE.replace(old, new))([ONE])
    assert str(caught.value).startswith("a.jsonl:1: ")


def test_a_template_that_refuses_names_the_sample() -> None:
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    bad = Sample((Turn("system", "be short"), *ONE.turns), ONE.images, "a.jsonl:9")
    with pytest.raises(GracecError, match=r"a.jsonl:9: the processor refuses .*\(no system\)"):
        collator(guard + TEMPLATE)([ONE, bad])


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
    with pytest.raises(EmptyBatch, match="leave no picture"):
        collate([broken, sample("yes or no ?", "no")])


def test_a_batch_without_a_picture_is_an_error() -> None:
    with pytest.raises(GracecError, match="no sample of the batch has a picture") as caught:
        collator()([sample("yes or no ?", "no")])
    assert not isinstance(caught.value, EmptyBatch)
    with pytest.raises(GracecError, match="a batch needs a sample"):
        collator()([])


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


def test_truncation_inside_a_picture_is_an_error() -> None:
    late = sample("is it red ?", "yes", "<image> and this ?", "no", where="a.jsonl:5")
    ids = collator()([late])["input_ids"][0].tolist()
    end = len(ids) - ids[::-1].index(IMAGE)
    collator(max_length=end)([late])
    for length in (end - 1, end - IMAGE_TOKENS + 1, end - IMAGE_TOKENS):
        with pytest.raises(GracecError, match="a.jsonl:5: max_length .* a part of a picture"):
            collator(max_length=length)([sample("yes or no ?", "no"), late])


def test_processors_that_cannot_be_used() -> None:
    class Bare:
        tokenizer = None

    with pytest.raises(GracecError, match="Bare: has no tokenizer"):
        Collator(Bare(), model())
    with pytest.raises(GracecError, match="max_length must be at least 1"):
        collator(max_length=0)
    processor: Any = tiny_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(GracecError, match="no padding token"):
        Collator(processor, model())
    processor = tiny_processor()
    processor.image_token = None
    with pytest.raises(GracecError, match="has no image token"):
        Collator(processor, model())
    processor = tiny_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(GracecError, match="neither the model nor the tokenizer has an end-of"):
        Collator(processor, nn.Linear(1, 1))


def test_from_file_to_batch(tmp_path: Path) -> None:
    data = open_train_data(write(tmp_path, record(), {"conversations": talk("no ?", "yes")}))
    collate = collator()
    batch = collate([data.sample(index) for index in range(len(data))])
    assert [answers(collate.processor, batch, row) for row in (0, 1)] == [
        ["red </s>"],
        ["yes </s>"],
    ]
