"""Conversations with a teacher's answers: where they go, and what of them is learned."""

from __future__ import annotations

from typing import Any

import pytest

from gracec.data.conversations import Sample, read_conversations
from gracec.data.records import Turn
from gracec.data.sources import open_source
from gracec.data.taught import EMPTY, Reply, TaughtSource, answered, wanted
from gracec.errors import GracecWarning
from tests.data.collators import answers, collator
from tests.data.conversations import said, talk
from tests.tiny import tiny_image

SHORT, LONG = Reply("green", 1), Reply("a red circle", 3, complete=False)
WHOLE = said("what ?", "red", "where ?", "left")


def test_answers_are_asked_for_where_they_are_learned_or_missing() -> None:
    assert wanted(WHOLE) == [1, 3] and wanted(WHOLE[:3]) == [1, 3] and wanted(WHOLE[:1]) == [1]
    context = (WHOLE[0], Turn("assistant", "red", learned=False), *WHOLE[2:])
    assert wanted(context) == [3] and wanted(context[:3]) == [3]
    assert answered(context, []) == context[:3]
    assert answered(WHOLE, []) == WHOLE[:1] == answered(WHOLE[:1], [])
    assert answered(WHOLE, [SHORT]) == (WHOLE[0], Turn("assistant", "green"), WHOLE[2])
    for turns in (WHOLE, WHOLE[:3]):
        assert [turn.text for turn in answered(turns, [SHORT, LONG])[1::2]] == [
            "green",
            "a red circle",
        ]


def test_the_records_are_those_of_the_source_with_the_answers() -> None:
    records: list[dict[str, Any]] = [
        {"image": tiny_image(0), "question": "what ?"},
        {"image": tiny_image(1), "question": "what ?", "answer": "blue"},
        {"question": "what is red ?"},
        {"question": "why ?"},
        {"conversations": talk("what ?", "red", "where ?")},
    ]
    replies = {0: (SHORT,), 1: (LONG,), 2: (Reply("", 0),), 4: (SHORT, SHORT)}
    source = TaughtSource(open_source(records), replies, {3: "it is too long"}, {})
    assert open_source(source) is source
    with pytest.warns(GracecWarning, match="2 of 5 samples are broken"):
        data = read_conversations(source)
    assert data.problems == [f"record 2: {EMPTY}", "record 3: it is too long"]
    collate = collator()
    samples = [one for one in map(data.sample, range(3)) if isinstance(one, Sample)]
    batch = collate(samples)
    # Of the answer that was cut the end is not learned.
    assert answers(collate.processor, batch, 0) == ["green </s>"]
    assert answers(collate.processor, batch, 1) == ["a red circle"]
    assert answers(collate.processor, batch, 2) == ["green </s>", "green </s>"]
    other = TaughtSource(open_source(records), {**replies, 0: (LONG,)}, {3: "it is too long"}, {})
    assert other.content != source.content
