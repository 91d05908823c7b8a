"""Conversations as questions whose last answer is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gracec.errors import GracecError, GracecWarning
from gracec.evaluate import evaluate_vqa, load_questions
from gracec.evaluate.references import asked
from tests.tiny import tiny_image, tiny_llava, tiny_processor


def written(folder: Path, *records: dict[str, Any]) -> Path:
    for number in range(2):
        tiny_image(number).save(folder / f"{number}.png")
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


SEVERAL = {
    "images": ["0.png", "1.png"],
    "messages": turns("<image> <image> what is this ?", "red", "and where ?", "left"),
}
TEXT = {"messages": turns("what is red ?", "a color")}
PAIR = {"image": "0.png", "question": "what is this ?", "answer": "blue"}


def test_the_last_answer_is_expected_after_all_that_was_said(tmp_path: Path) -> None:
    found, skipped = load_questions(written(tmp_path, SEVERAL, TEXT, PAIR))
    assert [one.answer for one in found] == ["left", "a color", "blue"]
    assert not skipped
    said = asked(found[0])
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert [part["type"] for part in said[0]["content"]] == ["image", "image", "text"]
    model, processor = tiny_llava().eval(), tiny_processor()
    report = evaluate_vqa(model, processor, found, batch_size=2, max_new_tokens=2)
    assert report.overall.n == 3 and report.overall.blind_accuracy is not None
    assert load_questions(tmp_path, limit=2)[0] == load_questions(tmp_path, limit=2)[0]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = {"image": "broken.png", "question": "?", "answer": "x"}
    path = written(tmp_path, PAIR, TEXT, {"image": "no.png", **TEXT}, broken, PAIR)
    with pytest.warns(GracecWarning, match="left out"):
        found, skipped = load_questions(path)
    assert len(found) == 3
    assert [line.partition(": ")[0] for line in skipped] == [f"{path}:3", f"{path}:4"]
    (tmp_path / "text.txt").write_text("only words")
    with pytest.raises(GracecError, match="plain text has no answers"):
        load_questions(tmp_path / "text.txt")
