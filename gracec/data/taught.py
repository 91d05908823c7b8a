"""Data whose answers a teacher gave: the records of another source, with other answers.

    wanted(turns)                    [1, 3]: where answers are asked for
    answered(turns, replies)         the turns with these
    TaughtSource(opened, replies)    the source

What is asked is what a user said. An answer that is not to be learned is part of the question, and
stays as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gracec.data.records import Broken, Conversation, Turn, check_turns, read_record
from gracec.data.sources import Source

EMPTY = "the teacher's answer is empty"


@dataclass(frozen=True)
class Reply:
    """An answer of a teacher.

    Attributes:
        tokens: how many it took.
        complete: whether it ended by itself; otherwise it was cut at the limit.
    """

    text: str
    tokens: int
    complete: bool = True


def wanted(turns: Sequence[Turn]) -> list[int]:
    """Positions in a conversation where an answer is to be learned, or is still to come."""
    found = [at for at, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    return [*found, len(turns)] if turns[-1].role == "user" else found


def answered(turns: Sequence[Turn], replies: Sequence[Reply]) -> tuple[Turn, ...]:
    """The turns with replies at the first positions that are wanted, of the others nothing."""
    found = list(turns)
    places = wanted(turns)
    for at, reply in zip(places, replies, strict=False):
        found[at : at + 1] = [Turn("assistant", reply.text, complete=reply.complete)]
    return tuple(found if len(replies) >= len(places) else found[: places[len(replies)]])


@dataclass(frozen=True)
class TaughtSource:
    """A `Source` of conversations.

    Attributes:
        opened: where the questions are.
        replies: number of a record -> all of its answers.
        refused: number of a record -> why it was not answered.
        summary: what a report says of the answers, JSON-able.
    """

    opened: Source
    replies: Mapping[int, tuple[Reply, ...]]
    refused: Mapping[int, str]
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.opened.name

    @property
    def folder(self) -> Path | None:
        return self.opened.folder

    @cached_property
    def content(self) -> bytes:
        said = {n: [asdict(one) for one in own] for n, own in sorted(self.replies.items())}
        text = json.dumps([said, sorted(self.refused.items())])
        return hashlib.sha256(self.opened.content + text.encode()).digest()

    def __len__(self) -> int:
        return len(self.opened)

    def where(self, number: int) -> str:
        return self.opened.where(number)

    def record(self, number: int) -> Conversation:
        """A conversation with the teacher's answers.

        Raises:
            Broken: if the question is, or was not answered.
        """
        asked = read_record(self.opened.record(number), answered=False)
        replies = self.replies.get(number)
        if replies is None:
            raise Broken("not answered", self.refused.get(number, "the teacher was not asked"))
        if not all(reply.text for reply in replies):
            raise Broken("empty text", EMPTY)
        turns = answered(asked.turns, replies)
        check_turns(turns)
        return replace(asked, turns=turns)
