"""Batches of conversations about pictures, with the answers as labels.

collate = Collator(processor, model, max_length=2048)
batch = collate([data.sample(index) for index in (3, 1, 2)])
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gracec.data.answers import Answers, Row, stop_tokens
from gracec.data.conversations import BrokenSample, Sample
from gracec.data.prompts import Prompts, messages, padding_token
from gracec.data.records import IMAGE_PLACEHOLDER, Broken
from gracec.errors import GracecError, GracecWarning
from gracec.objective.labels import IGNORE_INDEX

Batch = dict[str, Tensor]

PICTURES = "picture_digests"
"""uint8 [B, 32] of a batch: a digest of the pictures of each sample, if it was asked for."""


class EmptyBatch(GracecError):
    """Broken samples were left out of a batch, and nothing to train on is left: take the next."""


def picture_digest(images: Sequence[Image.Image]) -> Tensor:
    """uint8 [32]: of sizes and pixels."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


@dataclass(frozen=True)
class Collator:
    """Samples to a batch, through the processor and the chat template of the model.

    Args:
        processor: of the model; its chat template builds the text, or, where it has none, the
            turns follow each other in lines, as in `gracec.evaluate`.
        model: tells at which tokens generation stops.
        max_length: tokens of the longest sample; longer ones are cut at the end.
        strict: whether a sample that is found to be broken here is an error.
        names_pictures: whether a batch has `PICTURES`.

    `problems` has a line for each of them otherwise.

    Raises:
        GracecError: if the processor has no tokenizer or no image token, or if the model has no
            token to stop at.
    """

    processor: Any
    model: nn.Module
    max_length: int | None = None
    strict: bool = False
    names_pictures: bool = False
    problems: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        name = type(self.processor).__name__
        if getattr(self.processor, "tokenizer", None) is None:
            raise GracecError("has no tokenizer", where=name, fix="give the model's processor")
        if self.max_length is not None and self.max_length < 1:
            raise GracecError(f"max_length must be at least 1, not {self.max_length}")
        _ = self._answers.prompts.image_token  # fails early, as does what ends an answer

    def __call__(self, samples: Sequence[Sample | BrokenSample]) -> Batch:
        """Encode samples; broken ones, and those that the processor refuses, are left out.

        Returns:
            What the processor makes of them, padded on the right: `input_ids` and `attention_mask`
            int64 [B, T], `pixel_values` (LLaVA: float32 [images, 3, H, W]) if a sample has a
            picture, and whatever else the family takes; and `labels` int64 [B, T], where
            labels[b, t] is token t if it belongs to an answer or ends one, else -100. The shift to
            the next token is up to the loss.

        Raises:
            EmptyBatch: if, without broken samples, nothing to train on is left.
            GracecError: if the template writes an answer otherwise than after its own prompt; if
                `max_length` cuts off a part of a picture; in strict mode, if a sample is broken.
        """
        return self._collated(samples, self._row)

    def unlabelled(self, *samples: Sample | BrokenSample) -> Batch:
        """Samples of whose labels nothing is learned; they may end with a question.

        Returns:
            As for a batch; the labels are all -100. Where every sample ends with a question, what
            asks for its answer follows.

        Raises:
            EmptyBatch: if all are broken, or the processor refuses them.
            GracecError: as for a batch.
        """
        turns = [sample.turns for sample in samples if isinstance(sample, Sample)]
        asks = bool(turns) and all(own[-1].role != "assistant" for own in turns)

        def row(encoded: Mapping[str, Any], index: int, sample: Sample) -> Row:
            return self._answers.unlabelled(sample, self._ids(encoded, index))

        return self._collated(samples, row, generation_prompt=asks)

    def _collated(
        self,
        samples: Sequence[Sample | BrokenSample],
        row: Callable[[Mapping[str, Any], int, Sample], Row | None],
        *,
        generation_prompt: bool = False,
    ) -> Batch:
        """A batch of what is not broken.

        Args:
            row: of what is encoded, the row of a sample; None if it is broken.
        """
        if not samples:
            raise GracecError("a batch needs a sample")
        whole = [sample for sample in samples if isinstance(sample, Sample)]
        usable = [sample for sample in whole if self._is_usable(sample)]
        while usable:
            try:
                encoded = self._encode(usable, generation_prompt=generation_prompt)
            except GracecError:
                taken = [sample for sample in usable if self._is_taken(sample)]
                if len(taken) == len(usable):
                    raise  # together only
                usable = taken
                continue
            rows = [row(encoded, i, sample) for i, sample in enumerate(usable)]
            if all(found is not None for found in rows):
                batch = self._batch(encoded, [found for found in rows if found is not None])
                if self.names_pictures:
                    batch[PICTURES] = torch.stack([picture_digest(one.images) for one in usable])
                return batch
            # Which pixels belong to a sample is known to the processor only: once more, without.
            usable = [one for one, found in zip(usable, rows, strict=True) if found is not None]
        raise self._empty(samples[0])

    def _empty(self, first: Sample | BrokenSample) -> EmptyBatch:
        last = f", the last being {self.problems[-1]}" if self.problems else ""
        return EmptyBatch(
            f"broken samples leave nothing to train on{last}",
            where=first.where or "batch",
            fix="mend the data, or make batches larger",
        )

    def _encode(
        self, samples: Sequence[Sample], *, generation_prompt: bool = False
    ) -> dict[str, Any]:
        prompts = self._answers.prompts
        return prompts.encode(
            [messages(sample.turns, sample.images) for sample in samples],
            [sample.name for sample in samples],
            padding_side="right",
            generation_prompt=generation_prompt,
            answer_masks=prompts.marks_answers,
        )

    @property
    def notes(self) -> list[str]:
        """What is to be known of batches of several samples."""
        if self._tokenizer.pad_token is not None:
            return []
        token = padding_token(self._tokenizer)
        return [f"the tokenizer has no padding token: {token!r} pads, and is masked"]

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def _answers(self) -> Answers:
        stops = stop_tokens(self.model, self.processor)
        end = self._tokenizer.convert_ids_to_tokens(stops[0])
        return Answers(Prompts(self.processor, end), stops, self.max_length)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        tokens = {*self._tokenizer.all_special_tokens, self.processor.image_token}
        return re.compile("|".join(re.escape(str(token)) for token in sorted(tokens)))

    def refusal(self, sample: Sample) -> str:
        """Why a sample is left out of a batch, as far as its text tells; or ""."""
        texts = (turn.text.replace(IMAGE_PLACEHOLDER, "") for turn in sample.turns)
        found = next((match for text in texts if (match := self._control.search(text))), None)
        return f"the text has {found[0]!r}, a control token of the tokenizer" if found else ""

    def _is_usable(self, sample: Sample) -> bool:
        reason = self.refusal(sample)
        if reason:
            self._report(sample, reason)
        return not reason

    def _is_taken(self, sample: Sample) -> bool:
        """Whether the processor takes a sample by itself: a picture may be too long for it."""
        try:
            self._encode([sample])
        except GracecError as error:
            self._report(sample, error.what)
            return False
        return True

    def _report(self, sample: Sample, reason: str) -> None:
        if self.strict:
            raise GracecError(reason, where=sample.where)
        self.learn(f"{sample.where or 'sample'}: {reason}")

    def learn(self, problem: str) -> None:
        """Note that a sample is left out; the first time is a warning."""
        first = not self.problems
        if problem not in self.problems:
            self.problems.append(problem)
        if first:
            warnings.warn(f"{problem}; samples like this are left out", GracecWarning, stacklevel=5)

    def _row(self, encoded: Mapping[str, Any], index: int, sample: Sample) -> Row | None:
        """Row `index` of the batch, without padding; None if the sample is broken."""
        ids = self._ids(encoded, index)
        marks: list[int] = []
        if self._answers.prompts.marks_answers:
            marks = torch.as_tensor(encoded["assistant_masks"][index])[: len(ids)].tolist()
        try:
            return self._answers.row(sample, ids, marks)
        except Broken as broken:
            self._report(sample, broken.reason)
            return None

    def _ids(self, encoded: Mapping[str, Any], index: int) -> list[int]:
        """The tokens of row `index`, without padding."""
        mask: Tensor = encoded["attention_mask"][index]
        length = int(mask.sum())
        if not bool(mask[:length].all()):
            raise GracecError("the processor does not pad on the right", where="batch")
        found: list[int] = encoded["input_ids"][index, :length].tolist()
        return found

    def _batch(self, encoded: Mapping[str, Any], rows: Sequence[Row]) -> Batch:
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
        pad = self._tokenizer.convert_tokens_to_ids(padding_token(self._tokenizer))
        batch["labels"] = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][index] = pad
            batch["input_ids"][index, :length] = torch.tensor(row.ids)
            batch["attention_mask"][index] = torch.arange(shape[1]) < length
            for start, end in row.spans:
                batch["labels"][index, start:end] = torch.tensor(row.ids[start:end])
        return batch
