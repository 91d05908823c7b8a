"""Batches of conversations about pictures, with the answers as labels.

collate = Collator(processor, model, max_length=2048)
batch = collate([data.sample(index) for index in (3, 1, 2)])
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor, nn

from gracec.errors import GracecError, GracecWarning, first_line
from gracec.objective.labels import IGNORE_INDEX
from gracec.training.data import BrokenSample, Sample
from gracec.training.records import IMAGE_PLACEHOLDER, Turn

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates and processors raise for input that they do not take.
_REFUSALS = (ValueError, TypeError, KeyError, IndexError, RuntimeError, TemplateError)

Batch = dict[str, Tensor]


class EmptyBatch(GracecError):
    """Broken samples were left out of a batch, and nothing to train on is left: take the next."""


@dataclass(frozen=True)
class _Row:
    """One sample as tokens, without padding, and the half-open spans of its answers."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Collator:
    """Samples to a batch, through the processor and the chat template of the model.

    Args:
        processor: of the model; its chat template builds the text, or, where it has none, the
            turns follow each other in lines, as in `gracec.evaluate`.
        model: tells at which tokens generation stops.
        max_length: tokens of the longest sample; longer ones are cut at the end.
        strict: whether a sample that is found to be broken here is an error.

    `problems` has a line for each of them otherwise.

    Raises:
        GracecError: if the processor has no tokenizer, no padding token or no image token, or if
            the model has no token to stop at.
    """

    processor: Any
    model: nn.Module
    max_length: int | None = None
    strict: bool = False
    problems: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        name = type(self.processor).__name__
        if getattr(self.processor, "tokenizer", None) is None:
            raise GracecError("has no tokenizer", where=name, fix="give the model's processor")
        if self._tokenizer.pad_token_id is None:
            raise GracecError(
                "the tokenizer has no padding token", where=name, fix="set tokenizer.pad_token"
            )
        if not isinstance(getattr(self.processor, "image_token", None), str):
            raise GracecError("has no image token", where=name, fix="give the model's processor")
        if self.max_length is not None and self.max_length < 1:
            raise GracecError(f"max_length must be at least 1, not {self.max_length}")
        _ = self._stops  # fails early

    def __call__(self, samples: Sequence[Sample | BrokenSample]) -> Batch:
        """Encode samples; broken ones are left out.

        Returns:
            What the processor makes of them, padded on the right: `input_ids` and `attention_mask`
            int64 [B, T], `pixel_values` (LLaVA: float32 [images, 3, H, W]) and whatever else the
            family takes; and `labels` int64 [B, T], where labels[b, t] is token t if it belongs to
            an answer or ends one, else -100. The shift to the next token is up to the loss.

        Raises:
            EmptyBatch: if, without broken samples, nothing to train on is left.
            GracecError: if no sample has a picture; if the processor or the template refuses a
                sample; if the template writes an answer otherwise than after its own prompt; if
                `max_length` cuts off a part of a picture; in strict mode, if a sample is broken.
        """
        if not samples:
            raise GracecError("a batch needs a sample")
        whole = [sample for sample in samples if isinstance(sample, Sample)]
        usable = [sample for sample in whole if self._is_usable(sample)]
        while usable:
            if not any(sample.images for sample in usable):
                if len(usable) < len(samples):
                    break
                raise GracecError(
                    "no sample of the batch has a picture, which the model needs",
                    where=usable[0].where or "batch",
                    fix="make batches larger, or leave out samples without a picture",
                )
            encoded = self._encode(usable)
            rows = [self._row(encoded, i, sample) for i, sample in enumerate(usable)]
            if all(row is not None for row in rows):
                return self._batch(encoded, [row for row in rows if row is not None])
            # Which pixels belong to a sample is known to the processor only: once more, without.
            usable = [sample for sample, row in zip(usable, rows, strict=True) if row is not None]
        raise EmptyBatch(
            f"broken samples leave {'no picture' if usable else 'nothing'} to train on",
            where=samples[0].where or "batch",
            fix="mend the data, or make batches larger",
        )

    # Before encoding

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        """The tokens that end generation; the first is the one that is appended."""
        model: Any = self.model
        own = self._tokenizer.eos_token_id
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        for holder in (getattr(model, "generation_config", None), text, config):
            found = getattr(holder, "eos_token_id", None)
            if found is not None:
                stops = [found] if isinstance(found, int) else list(found)
                return tuple(sorted(stops, key=lambda stop: stop != own))
        if own is None:
            raise GracecError(
                "neither the model nor the tokenizer has an end-of-sequence token",
                where=type(self.processor).__name__,
                fix="set model.generation_config.eos_token_id",
            )
        return (int(own),)

    @cached_property
    def _image_id(self) -> int:
        found = getattr(self.processor, "image_token_id", None)
        if found is None:
            found = self._tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return int(found)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        tokens = {*self._tokenizer.all_special_tokens, self.processor.image_token}
        return re.compile("|".join(re.escape(str(token)) for token in sorted(tokens)))

    @cached_property
    def _marks_answers(self) -> bool:
        """Whether the template says itself what the model has to generate."""
        template = getattr(self.processor, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        return fast and isinstance(template, str) and bool(_GENERATION.search(template))

    def _is_usable(self, sample: Sample) -> bool:
        for turn in sample.turns:
            found = self._control.search(turn.text.replace(IMAGE_PLACEHOLDER, ""))
            if found:
                self._report(sample, f"the text has {found[0]!r}, a control token of the tokenizer")
                return False
        return True

    def _report(self, sample: Sample, reason: str) -> None:
        if self.strict:
            raise GracecError(reason, where=sample.where)
        first = not self.problems
        line = f"{sample.where or 'sample'}: {reason}"
        if line not in self.problems:
            self.problems.append(line)
        if first:
            warnings.warn(f"{line}; samples like this are left out", GracecWarning, stacklevel=4)

    # Encoding

    def _encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors; an error names the first sample that fails by itself."""
        try:
            return self._encode_together(samples)
        except _REFUSALS as error:
            for sample in samples:
                try:
                    self._encode_together([sample])
                except _REFUSALS as own:
                    raise self._refused(sample, own) from own
            raise GracecError(
                f"the processor refuses the batch ({first_line(error)})", where=samples[0].where
            ) from error

    def _encode_together(self, samples: Sequence[Sample]) -> dict[str, Any]:
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        if getattr(self.processor, "chat_template", None):
            return dict(
                self.processor.apply_chat_template(
                    [_messages(sample.turns, sample.images) for sample in samples],
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",  # SmolVLM does not look for it among the options
                    return_assistant_tokens_mask=self._marks_answers,
                    processor_kwargs=options,
                )
            )
        texts = [self._text(sample.turns) for sample in samples]
        images = [list(sample.images) for sample in samples]
        return dict(self.processor(images=images, text=texts, **options))

    @staticmethod
    def _refused(sample: Sample, error: BaseException) -> GracecError:
        reason = f"the processor refuses the sample ({first_line(error)})"
        return GracecError(reason, where=sample.where)

    def _text(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        """The text of some turns, with one placeholder an image; `prompt` asks for an answer."""
        if getattr(self.processor, "chat_template", None):
            rendered: list[str] = self.processor.apply_chat_template(
                [_messages(turns)], add_generation_prompt=prompt
            )
            return rendered[0]
        end = self._tokenizer.convert_ids_to_tokens(self._stops[0])
        lines = []
        for turn in turns:
            parts = _messages([turn])[0]["content"]
            texts = [part.get("text", self.processor.image_token) for part in parts]
            lines.append("\n".join(texts) + (end if turn.role == "assistant" else ""))
        return "\n".join(lines)

    def _special_tokens(self, text: str) -> dict[str, bool]:
        """As `apply_chat_template` does: none are added where the template wrote the first."""
        bos = self._tokenizer.bos_token
        written = getattr(self.processor, "chat_template", None) and bos and text.startswith(bos)
        return {"add_special_tokens": False} if written else {}

    # Answers

    def _row(self, encoded: Mapping[str, Any], index: int, sample: Sample) -> _Row | None:
        """Row `index` of the batch, its answers closed and its length limited; None if broken."""
        mask: Tensor = encoded["attention_mask"][index]
        length = int(mask.sum())
        if not bool(mask[:length].all()):
            raise GracecError("the processor does not pad on the right", where="batch")
        ids: list[int] = encoded["input_ids"][index, :length].tolist()
        if (self._image_id in ids) != bool(sample.images):
            raise GracecError(
                "the text has no place for its pictures, or one without a picture",
                where=sample.where,
                fix="use the model's own chat template",
            )
        spans = self._spans(sample, ids)
        if self._marks_answers:
            marks = torch.as_tensor(encoded["assistant_masks"][index])[:length].tolist()
            marked = _runs(marks)
            if len(marked) != len(spans):
                raise GracecError(
                    f"the chat template marks {len(marked)} answers of {len(spans)}",
                    where=sample.where,
                    fix="put {% generation %} around the answers",
                )
            # A mark covers tokens that it touches, the first of the next turn perhaps.
            ends = [end for _, end in spans]
            spans = [
                (start, min(end, last)) for (start, end), last in zip(marked, ends, strict=True)
            ]
        if any(start >= end for start, end in spans):
            self._report(sample, "the tokenizer knows no token for an answer")
            return None
        row = self._limited(self._closed(ids, spans), sample)
        if not row.spans:
            self._report(sample, f"max_length {self.max_length} leaves no token of an answer")
            return None
        return row

    def _spans(self, sample: Sample, ids: list[int]) -> list[tuple[int, int]]:
        """The turns of the assistant in `ids`: from the prompt for each to its end.

        If the template marks the answers itself, a start is that of the text.
        """
        text = self._text(sample.turns)
        places = text.count(self.processor.image_token)
        if places not in (0, len(sample.images)):
            raise GracecError(
                f"the chat template has {places} places for {len(sample.images)} images",
                where=sample.where,
            )
        plain = self._plain_tokens(text)
        # Usually expanding the placeholders is all that the processor has done to the text; then
        # prompts need not go through it, with their pictures, one by one.
        kept = [at for at, token in enumerate(ids) if token != self._image_id]
        words = [at for at, token in enumerate(plain) if token != self._image_id]
        if [ids[at] for at in kept] != [plain[at] for at in words]:
            return self._prefix_spans(sample, text, ids, pictures=True)
        place = dict(zip(words, kept, strict=True))
        found = self._prefix_spans(sample, text, plain, pictures=False)
        # An answer without tokens may begin where the text ends.
        return [(place.get(start, len(ids)), place[end - 1] + 1) for start, end in found]

    def _prefix_spans(
        self, sample: Sample, text: str, ids: list[int], *, pictures: bool
    ) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(sample.turns):
            if turn.role != "assistant":
                continue
            start = 0 if self._marks_answers else self._start(sample, number, text, ids, pictures)
            whole = self._text(sample.turns[: number + 1])
            if not text.startswith(whole):
                raise GracecError(
                    f"the chat template writes answer {len(spans) + 1} otherwise once more follows",
                    where=sample.where,
                    fix="use a chat template that writes each turn by itself",
                )
            # The last blank of a turn may be one token with what follows, hence the common part.
            end = _common(self._tokens(whole, sample, number + 1, pictures), ids)
            spans.append((start, end))
        return spans

    def _start(self, sample: Sample, number: int, text: str, ids: list[int], pictures: bool) -> int:
        """Tokens of the prompt for turn `number`, with which `ids` must begin."""
        prompt = self._text(sample.turns[:number], prompt=True)
        before = self._tokens(prompt, sample, number, pictures)
        if not text.startswith(prompt) or ids[: len(before)] != before:
            raise GracecError(
                f"the conversation does not begin with the prompt for its turn {number + 1}",
                where=sample.where,
                fix="use a chat template whose add_generation_prompt writes what it writes before "
                "an answer",
            )
        return len(before)

    def _tokens(self, text: str, sample: Sample, turns: int, pictures: bool) -> list[int]:
        images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns[:turns])
        if not pictures or not images:
            return self._plain_tokens(text)
        try:
            encoded = self.processor(
                images=[list(sample.images[:images])], text=[text], **self._special_tokens(text)
            )
        except _REFUSALS as error:
            raise self._refused(sample, error) from error
        return [int(token) for token in encoded["input_ids"][0]]

    def _plain_tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, **self._special_tokens(text))["input_ids"]
        return found

    def _closed(self, ids: list[int], spans: Sequence[tuple[int, int]]) -> _Row:
        """Every answer up to the first token that stops generation; the last one always has it."""
        closed = []
        for number, (start, end) in enumerate(spans):
            last = number == len(spans) - 1
            limit = len(ids) if last else spans[number + 1][0]
            stop = next((at for at in range(start, limit) if ids[at] in self._stops), None)
            if stop is not None and all(self._is_blank(token) for token in ids[end:stop]):
                closed.append((start, stop + 1))
                continue
            while end > start + 1 and self._is_blank(ids[end - 1]):
                end -= 1
            if last:
                ids = [*ids[:end], self._stops[0]]
                end += 1
            closed.append((start, end))
        return _Row(ids, closed)

    def _is_blank(self, token: int) -> bool:
        return not str(self._tokenizer.decode([token])).strip()

    def _limited(self, row: _Row, sample: Sample) -> _Row:
        length = self.max_length
        if length is None or len(row.ids) <= length:
            return row
        if self._image_id in row.ids[length:]:
            raise GracecError(
                f"max_length {length} cuts off a part of a picture",
                where=sample.where,
                fix="allow longer samples, or leave this one out",
            )
        spans = [(start, min(end, length)) for start, end in row.spans if start < length]
        return _Row(row.ids[:length], spans)

    def _batch(self, encoded: Mapping[str, Any], rows: Sequence[_Row]) -> Batch:
        """The processor's tensors with the rows as they are now, and the labels."""
        old: Tensor = encoded["input_ids"]
        shape = (len(rows), max(len(row.ids) for row in rows))
        batch: Batch = {}
        for name, value in encoded.items():
            if not isinstance(value, Tensor) or name == "assistant_masks":
                continue
            batch[name] = value
            if value.shape == old.shape:  # of tokens: input_ids, attention_mask, token types
                width = min(shape[1], old.shape[1])
                batch[name] = value.new_zeros(shape)
                batch[name][:, :width] = value[:, :width]
        batch["labels"] = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][index] = self._tokenizer.pad_token_id
            batch["input_ids"][index, :length] = torch.tensor(row.ids)
            batch["attention_mask"][index] = torch.arange(shape[1]) < length
            for start, end in row.spans:
                batch["labels"][index, start:end] = torch.tensor(row.ids[start:end])
        return batch


def _messages(turns: Sequence[Turn], images: Sequence[Image.Image] = ()) -> list[dict[str, Any]]:
    """Turns as a chat template takes them; without `images` the parts for images are empty."""
    rest = iter(images)
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            if number:
                parts.append(
                    {"type": "image", "image": next(rest)} if images else {"type": "image"}
                )
            if text.strip():
                parts.append({"type": "text", "text": text.strip()})
        messages.append({"role": turn.role, "content": parts})
    return messages


def _runs(marks: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open spans of the consecutive ones."""
    edges = [at for at in range(len(marks) + 1) if _mark(marks, at) != _mark(marks, at - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _mark(marks: Sequence[int], at: int) -> bool:
    return 0 <= at < len(marks) and bool(marks[at])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
