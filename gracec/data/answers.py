"""Where in the tokens of a conversation its answers are: what a model learns to write.

An answer reaches from the end of the prompt for it to the first token that ends generation. A chat
template may mark its answers; otherwise each prompt is encoded once more, and has to be what the
conversation begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gracec.data.conversations import Sample
from gracec.data.prompts import Prompts, messages, refusals
from gracec.data.records import IMAGE_PLACEHOLDER, Broken
from gracec.errors import GracecError

Spans = list[tuple[int, int]]
"""Half-open, in order."""


@dataclass(frozen=True)
class Row:
    """One sample as tokens, without padding, and the spans of its answers that are learned."""

    ids: list[int]
    spans: Spans


def stop_tokens(model: nn.Module, processor: Any) -> tuple[int, ...]:
    """The tokens that end generation; first that of the tokenizer, if it is one of them.

    Raises:
        GracecError: if there is none.
    """
    own = processor.tokenizer.eos_token_id
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
            where=type(processor).__name__,
            fix="set model.generation_config.eos_token_id",
        )
    return (int(own),)


@dataclass(frozen=True)
class Answers:
    """Finds, closes and limits the answers of samples.

    Args:
        prompts: that the tokens come from.
        stops: the tokens that end an answer; the first is the one that is appended.
        max_length: tokens of the longest sample; longer ones are cut at the end.
    """

    prompts: Prompts
    stops: tuple[int, ...]
    max_length: int | None = None

    def row(self, sample: Sample, ids: list[int], marks: Sequence[int] = ()) -> Row:
        """The answers of a sample, closed, and the whole limited to `max_length`.

        Args:
            ids: the tokens of the sample, images expanded.
            marks: for each token whether it belongs to an answer, if the template marks them.

        Raises:
            Broken: if there is no token of an answer, or none is left.
            GracecError: if the template has no places for the pictures, marks the answers wrongly
                or writes them otherwise than after their prompts; if a part of a picture is cut.
        """
        self._check_places(sample, ids)
        spans = self._spans(sample, ids)
        if self.prompts.marks_answers:
            spans = _marked(sample, spans, marks)
        if any(start >= end for start, end in spans):
            raise Broken("no answer", "the tokenizer knows no token for an answer")
        row = self._limited(self._learned(self._closed(ids, spans), sample), sample)
        if not row.spans:
            raise Broken("no answer", f"max_length {self.max_length} leaves no token of an answer")
        return row

    def unlabelled(self, sample: Sample, ids: list[int]) -> Row:
        """A sample of which nothing is to be learned, limited to `max_length`.

        Raises:
            GracecError: if the template has no places for the pictures; if a part of one is cut.
        """
        self._check_places(sample, ids)
        return self._limited(Row(ids, []), sample)

    def _check_places(self, sample: Sample, ids: list[int]) -> None:
        if (self.prompts.image_id in ids) != bool(sample.images):
            raise GracecError(
                "the text has no place for its pictures, or one without a picture",
                where=sample.where,
                fix="use the model's own chat template",
            )

    def _spans(self, sample: Sample, ids: list[int]) -> Spans:
        """The turns of the assistant in `ids`: from the prompt for each to its end.

        If the template marks the answers itself, a start is that of the text.
        """
        text = self._text(sample, len(sample.turns))
        places = text.count(self.prompts.image_token)
        if places not in (0, len(sample.images)):
            raise GracecError(
                f"the chat template has {places} places for {len(sample.images)} images",
                where=sample.where,
            )
        plain = self.prompts.tokens(text)
        # Usually expanding the placeholders is all that the processor has done to the text; then
        # prompts need not go through it, with their pictures, one by one.
        image = self.prompts.image_id
        kept = [at for at, token in enumerate(ids) if token != image]
        words = [at for at, token in enumerate(plain) if token != image]
        if [ids[at] for at in kept] != [plain[at] for at in words]:
            return self._prefix_spans(sample, text, ids, pictures=True)
        place = dict(zip(words, kept, strict=True))
        found = self._prefix_spans(sample, text, plain, pictures=False)
        # An answer without tokens may begin where the text ends.
        return [(place.get(start, len(ids)), place[end - 1] + 1) for start, end in found]

    def _prefix_spans(self, sample: Sample, text: str, ids: list[int], *, pictures: bool) -> Spans:
        spans: Spans = []
        for number, turn in enumerate(sample.turns):
            if turn.role != "assistant":
                continue
            start = 0
            if not self.prompts.marks_answers:
                start = self._start(sample, number, text, ids, pictures)
            whole = self._text(sample, number + 1)
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
        prompt = self._text(sample, number, generation_prompt=True)
        before = self._tokens(prompt, sample, number, pictures)
        if not text.startswith(prompt) or ids[: len(before)] != before:
            raise GracecError(
                f"the conversation does not begin with the prompt for its turn {number + 1}",
                where=sample.where,
                fix="use a chat template whose add_generation_prompt writes what it writes before "
                "an answer",
            )
        return len(before)

    def _text(self, sample: Sample, turns: int, *, generation_prompt: bool = False) -> str:
        said = messages(sample.turns[:turns])
        with refusals(sample.name):
            return self.prompts.text(said, generation_prompt=generation_prompt)

    def _tokens(self, text: str, sample: Sample, turns: int, pictures: bool) -> list[int]:
        images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns[:turns])
        with refusals(sample.name):
            return self.prompts.tokens(text, sample.images[:images] if pictures else ())

    def _closed(self, ids: list[int], spans: Spans) -> Row:
        """Every answer up to the first token that stops generation; the last one always has it."""
        closed = []
        for number, (start, end) in enumerate(spans):
            last = number == len(spans) - 1
            limit = len(ids) if last else spans[number + 1][0]
            stop = next((at for at in range(start, limit) if ids[at] in self.stops), None)
            if stop is not None and all(self._is_blank(token) for token in ids[end:stop]):
                closed.append((start, stop + 1))
                continue
            while end > start + 1 and self._is_blank(ids[end - 1]):
                end -= 1
            if last:
                ids = [*ids[:end], self.stops[0]]
                end += 1
            closed.append((start, end))
        return Row(ids, closed)

    def _is_blank(self, token: int) -> bool:
        return not str(self.prompts.tokenizer.decode([token])).strip()

    def _learned(self, row: Row, sample: Sample) -> Row:
        """Without the answers that are not to be learned, and the end of one that was cut."""
        turns = (turn for turn in sample.turns if turn.role == "assistant")
        spans = []
        for (start, end), turn in zip(row.spans, turns, strict=True):
            end -= not turn.complete and row.ids[end - 1] in self.stops
            if turn.learned and start < end:
                spans.append((start, end))
        return Row(row.ids, spans)

    def _limited(self, row: Row, sample: Sample) -> Row:
        length = self.max_length
        if length is None or len(row.ids) <= length:
            return row
        if self.prompts.image_id in row.ids[length:]:
            raise GracecError(
                f"max_length {length} cuts off a part of a picture",
                where=sample.where,
                fix="allow longer samples, or leave this one out",
            )
        spans = [(start, min(end, length)) for start, end in row.spans if start < length]
        return Row(row.ids[:length], spans)


def _marked(sample: Sample, spans: Spans, marks: Sequence[int]) -> Spans:
    """The spans that a template marks, each ended where the turn does."""
    marked = _runs(marks)
    if len(marked) != len(spans):
        raise GracecError(
            f"the chat template marks {len(marked)} answers of {len(spans)}",
            where=sample.where,
            fix="put {% generation %} around the answers",
        )
    # A mark covers tokens that it touches, the first of the next turn perhaps.
    pairs = zip(marked, spans, strict=True)
    return [(start, min(end, last)) for (start, end), (_, last) in pairs]


def _runs(marks: Sequence[int]) -> Spans:
    """Spans of the consecutive ones."""
    edges = [at for at in range(len(marks) + 1) if _mark(marks, at) != _mark(marks, at - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _mark(marks: Sequence[int], at: int) -> bool:
    return 0 <= at < len(marks) and bool(marks[at])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
