"""Plain text as windows of tokens: what a model is calibrated on without conversations.

    windows = open_text("corpus.txt", processor)
    batch = windows.batch([0, 3])

All texts are tokenized one after the other and cut into windows of one length. A tokenizer that
begins every prompt with a token of its own (`<bos>`) begins every window with it. What looks like a
control token in a text is read as letters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gracec.data.conversations import BrokenSample, Ledger, epoch_order, is_plain_text
from gracec.data.prompts import Prompts, refusals
from gracec.data.records import Broken, as_record, read_text
from gracec.data.sources import MOST_CHARACTERS, Source, open_source
from gracec.errors import GracecError
from gracec.objective.labels import IGNORE_INDEX

WINDOW = 512
"""Tokens of a window, if the model has positions for so many."""
_PIECE = 1 << 16
"""Characters that are tokenized at once, about: a tokenizer keeps much about each token."""


@dataclass(frozen=True)
class TextWindows:
    """Windows of text by number.

    Attributes:
        tokens: int64 [N, T], all whole; a text that is shorter than one window is one of its own.
        fingerprint: SHA-256, in hex, of the tokens.
        notes: what is to be known of the text.
        problems: a line for each record that was left out.
    """

    tokens: Tensor
    fingerprint: str
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, tokens: Tensor, notes: tuple[str, ...] = (), problems: tuple[str, ...] = ()
    ) -> TextWindows:
        digest = hashlib.sha256(f"gracec text 1 {tuple(tokens.shape)}\n".encode())
        digest.update(tokens.contiguous().numpy().tobytes())
        return cls(tokens, digest.hexdigest(), notes, problems)

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(self, number: int) -> list[int]:
        """The tokens of window `number`, 0 <= number < len."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        found: list[int] = self.tokens[number].tolist()
        return found

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Some windows as a `Collator` would return them: nothing is padding, all labels -100."""
        ids = self.tokens[list(numbers)]
        labels = torch.full_like(ids, IGNORE_INDEX)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def split(self, share: float, seed: int) -> tuple[TextWindows, TextWindows]:
        """(train, held out): about `share` of the windows, drawn by the seed, are held out.

        Raises:
            GracecError: if `share` is not between 0 and 1, or there is one window only.
        """
        if not 0 < share < 1:
            raise GracecError(f"the share to hold out must be between 0 and 1, not {share}")
        if len(self) < 2:
            raise GracecError("cannot be split: there is one window only", fix="give more text")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        order = epoch_order(len(self), 0, seed)
        held, rest = sorted(order[:count]), sorted(order[count:])
        first = TextWindows.of(self.tokens[rest])
        return replace(first, notes=self.notes, problems=self.problems), TextWindows.of(
            self.tokens[held]
        )


def open_text(
    source: Any, processor: Any, length: int = WINDOW, *, strict: bool = False
) -> TextWindows:
    """Open plain text: a `.txt` or `.md` file, a folder of them, or records with a "text".

    Args:
        source: what `open_train_data` takes, with texts in the place of conversations.
        processor: whose tokenizer reads it.
        length: tokens of a window.
        strict: whether a broken record is an error.

    Raises:
        GracecError: if it cannot be read, is no plain text, or is too short.
    """
    return read_text_windows(open_source(source), processor, length, strict=strict)


def read_text_windows(
    opened: Source, processor: Any, length: int = WINDOW, *, strict: bool = False
) -> TextWindows:
    """What `open_text` makes of a source."""
    if not is_plain_text(opened):
        raise GracecError("no plain text", where=opened.name, fix='give records with a "text"')
    ledger = Ledger(opened.name, len(opened), strict)
    words = _Words.of(processor)
    notes: tuple[str, ...] = ()
    found: list[int] = []
    left = MOST_CHARACTERS
    for text in _texts(opened, ledger):
        found += words.tokens(text[:left], opened.name)
        if len(text) > left:
            notes = (f"{opened.name}: only the first {MOST_CHARACTERS:,} characters are read",)
            break
        left -= len(text)
    ledger.warn_summary()
    if len(found) < 2:
        raise GracecError("there is no text in it", where=opened.name, fix="give more text")
    if found.count(words.unknown) > len(found) // 2:
        notes += (f"{opened.name}: the tokenizer knows less than half of the text",)
    tokens = _windows(found, words.first, length)
    usable = (tokens != words.image).all(1)
    if not usable.all():
        notes += (f"{opened.name}: {int((~usable).sum())} windows hold tokens of pictures",)
    if not usable.any():
        raise GracecError("every window holds tokens of pictures", where=opened.name)
    problems = tuple(map(str, ledger.broken.values()))
    return TextWindows.of(tokens[usable], notes, problems)


def _texts(opened: Source, ledger: Ledger) -> Iterator[str]:
    for number in range(len(opened)):
        try:
            yield read_text(as_record(opened.record(number)))
        except Broken as broken:
            sample = BrokenSample(opened.where(number), broken.kind, broken.reason)
            ledger.add(number, sample, warn=False)


def _windows(tokens: Sequence[int], first: Sequence[int], length: int) -> Tensor:
    """int64 [N, T] of whole windows, each after `first`; what is left at the end is not used."""
    body = min(length - len(first), len(tokens))
    if body < 1:
        raise GracecError(f"windows of {length} tokens have no place for text")
    count = len(tokens) // body
    rows = torch.tensor(tokens[: count * body]).view(count, body)
    return torch.cat([torch.tensor([first] * count, dtype=torch.int64).view(count, -1), rows], 1)


@dataclass(frozen=True)
class _Words:
    """A tokenizer.

    Attributes:
        first: tokens that it begins a prompt with.
        image: the token that stands for pictures.
        unknown: the token of what it does not know, or -1.
    """

    tokenizer: Any
    first: list[int]
    image: int
    unknown: int

    @classmethod
    def of(cls, processor: Any) -> _Words:
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            name = type(processor).__name__
            raise GracecError("has no tokenizer", where=name, fix="give the model's processor")
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        unknown = getattr(tokenizer, "unk_token_id", None)
        image = Prompts(processor).image_id
        return cls(tokenizer, [bos] if begins else [], image, -1 if unknown is None else unknown)

    def tokens(self, text: str, where: str) -> Iterator[int]:
        """The tokens of a text, piece by piece."""
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= _PIECE:
                yield from self._tokens("".join(piece), where)
                piece, size = [], 0
        if piece:
            yield from self._tokens("".join(piece), where)

    def _tokens(self, text: str, where: str) -> list[int]:
        with refusals(where):
            found: list[int] = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
        return found
