"""A teacher answers what the data asks: once each, as it would alone, and never again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import gracec
from gracec.data.records import Broken
from gracec.data.sources import open_source
from gracec.data.taught import TaughtSource
from gracec.errors import GracecError
from gracec.evaluate import answer
from gracec.recipe import Training
from gracec.training import teacher_answers as module
from gracec.training.run_directory import LOCK, foreign_to_run, open_run, remove_run
from gracec.training.teacher_answers import answers_kept, teacher_answers
from tests.children import start, wait
from tests.data.conversations import talk
from tests.tiny import tiny_image, tiny_llava, tiny_processor

PICTURES = [{"image": tiny_image(n), "question": "what color is this ?"} for n in range(5)]
TALKS = [
    {"image": tiny_image(9), "conversations": talk("<image> what ?", "red", "where is it ?")},
    {"question": "what is red ?", "answer": "blue"},
]
RECORDS = [*PICTURES, *TALKS]


def rule(**fields: Any) -> Training:
    options = {"answers": "teacher", "max_new_tokens": 5, "micro_batch_size": 2}
    return Training.model_validate({**options, **fields})


def asked(records: Any = RECORDS, directory: Path | None = None, **more: Any) -> TaughtSource:
    strict = more.pop("strict", False)
    processor, options = tiny_processor(), rule(**more)
    opened = open_source(records)
    return teacher_answers(
        opened, tiny_llava(), processor, options, strict=strict, directory=directory
    )


def test_each_question_is_answered_as_it_would_be_alone() -> None:
    source, model, processor = asked(), tiny_llava(), tiny_processor()
    for number, one in enumerate(PICTURES):
        turns = source.record(number).turns
        expected = answer(model, processor, one["image"], "what color is this ?", max_new_tokens=5)
        assert [turn.text for turn in turns] == ["<image>\nwhat color is this ?", expected]
    talked = source.record(5).turns
    assert [turn.role for turn in talked] == ["user", "assistant"] * 2
    assert talked[1].text == source.replies[5][0].text != "red"
    assert source.record(6).turns[1].text != "blue"
    summary = source.summary
    assert (summary["conversations"], summary["answers"], summary["replaced"]) == (7, 8, 1)
    assert summary["longest"] <= summary["limit"] == 5
    every = [reply for own in source.replies.values() for reply in own]
    assert summary["cut"] == sum(not reply.complete for reply in every) > 0
    assert all(reply.complete or reply.tokens == 5 for reply in every)
    assert len(summary["examples"]) == 3


def test_what_was_answered_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, original, calls = asked(), module.replies, list[int]()

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(len(options["names"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, "replies", counting)
    with pytest.raises(KeyboardInterrupt):
        asked(directory=tmp_path)
    (file,) = answers_kept(tmp_path)
    assert len(file.read_text().splitlines()) == 3  # what decided them, and two batches
    with file.open("a") as stream:
        stream.write('{"round": 0, "batch": 2, "answers": [{"sam')  # killed while it was written
    found = asked(directory=tmp_path)
    assert found.replies == expected.replies and found.content == expected.content
    assert calls[3:] == [2, 1, 1]  # the rest of the first round, and the second
    assert asked(directory=tmp_path).replies == expected.replies and len(calls) == 6

    assert open_run(tmp_path, resume=True) == [] == foreign_to_run(tmp_path)
    with pytest.raises(GracecError, match="the recipe changed since"):
        asked(directory=tmp_path, max_new_tokens=6)
    with pytest.raises(GracecError, match="the data changed since"):
        asked(PICTURES, directory=tmp_path)
    file.write_text(file.read_text().replace('"tokens"', '"token"'))
    with pytest.raises(GracecError, match="0.jsonl: .*; remove it"):
        asked(directory=tmp_path)
    (tmp_path / "answers" / "mine.txt").write_text("")
    (tmp_path / LOCK).touch()
    assert foreign_to_run(tmp_path) == ["answers/mine.txt"]
    remove_run(tmp_path)
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["mine.txt"]


def answer_as_rank(rank: int, directory: Path) -> None:
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    content = asked(directory=directory).content
    (directory / f"{rank}.digest").write_bytes(content)
    dist.destroy_process_group()


def test_two_processes_share_the_questions_and_know_all_answers(tmp_path: Path) -> None:
    children = [start(answer_as_rank, rank, tmp_path) for rank in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    expected = asked().content
    assert [(tmp_path / f"{rank}.digest").read_bytes() for rank in range(2)] == [expected] * 2
    counts = [len(file.read_text().splitlines()) for file in answers_kept(tmp_path)]
    assert counts == [4, 3]  # each with its head: four batches of the first round, one more


@pytest.mark.filterwarnings("ignore::gracec.errors.GracecWarning")
def test_what_cannot_be_asked_is_left_out_with_its_reason(tmp_path: Path) -> None:
    long = "what ? " * 300
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = [{"question": text} for text in ("what is red ?", "what </s> ?", long, "where ?")]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"image": "bad.png", "question": "?"}])))
    source = asked(file)
    assert sorted(source.replies) == [0, 3]
    for number, reason in ((1, "control token"), (2, "no place for an answer"), (4, "decoded")):
        with pytest.raises(Broken, match=reason):
            source.record(number)
    with pytest.raises(GracecError, match="no place for an answer"):
        asked([{"question": long}], strict=True)
    with pytest.raises(GracecError, match="plain text asks nothing"):
        asked([{"text": "a cat"}])


def test_grace_distils_on_pictures_that_nobody_answered(tmp_path: Path) -> None:
    training = rule(steps=2, batch_size=2, held_out=0.4).model_dump()
    recipe = gracec.Recipe.from_dict(
        {"name": "test", "weights": {"decoder": {"group_size": 32}}, "training": training}
    )
    compiled = gracec.compile(
        tiny_llava(tie=True),
        recipe,
        train_data=PICTURES,
        processor=tiny_processor(),
        output_dir=tmp_path / "out",
        formats=(),
        progress=False,
    )
    report = compiled.report
    notes = [str(note) for note in report.notes]
    assert "no teacher was given: the original answers and teaches" in notes
    assert any(note.startswith("answers: the teacher gave 5 answers") for note in notes)
    assert report.training["answers"]["answers"] == 5 and report.training["steps"] == 2
    assert all(row["ce"] > 0 and row["distillation"] > 0 for row in report.training["rows"])
    assert not (tmp_path / "out.training").exists()
