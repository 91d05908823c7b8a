"""Processors, chat templates and samples that the tests of batches and answers share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

from gracec.data.collate import Collator
from gracec.data.conversations import Sample
from tests.data.conversations import said
from tests.tiny import (
    CHAT_TEMPLATE,
    IMAGE,
    IMAGE_TOKENS,
    WORDS,
    tiny_image,
    tiny_llava,
    tiny_processor,
)

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
