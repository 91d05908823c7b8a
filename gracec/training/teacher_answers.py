"""The answers of a teacher to the questions of some data, each given once.

    source = teacher_answers(opened, teacher, processor, rule, strict=False)

Greedy, in batches, a conversation turn by turn. What was answered is kept in the directory of a
run, so that going on asks nothing twice:

OUT.training/answers/0.jsonl    of the first rank: a line that says what decided the answers, and
                                one for each batch

Batches are the same however often it was interrupted, so the answers are too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from gracec.data.collate import Collator
from gracec.data.conversations import Sample, TrainData, is_plain_text, read_conversations
from gracec.data.prompts import messages
from gracec.data.records import IMAGE_PLACEHOLDER, Turn, short
from gracec.data.sources import Source
from gracec.data.taught import EMPTY, Reply, TaughtSource, answered, wanted
from gracec.directories import cannot_write
from gracec.errors import GracecError
from gracec.evaluate.ask import replies
from gracec.json_files import JsonModel, check_fields, parse_json
from gracec.recipe import Training
from gracec.training.checkpoints.fingerprint import (
    Fingerprint,
    FingerprintFields,
    describe_device,
    fingerprint_of_json,
    fingerprint_of_tensors,
)
from gracec.training.progress import shown
from gracec.training.samples import positions_of

ANSWERS = "answers"
"""Name of the folder in that of a run."""
EXAMPLES = 3
"""Answers that a report shows."""
_REMOVE = "remove it: what it holds is asked again"

Answer = Reply | str
"""A reply, or why there is none."""


class _Answer(JsonModel):
    """What a file says of one answer."""

    sample: int
    text: str = ""
    tokens: int = 0
    complete: bool = True
    refused: str = ""


class _Batch(JsonModel):
    """A line of a file: the answers of a batch of a round, in which each conversation has one."""

    round: int
    batch: int
    answers: list[_Answer]


class _Head(JsonModel):
    """The first line of a file."""

    fingerprint: FingerprintFields


def teacher_answers(
    opened: Source,
    teacher: PreTrainedModel,
    processor: Any,
    rule: Training,
    *,
    strict: bool = False,
    directory: Path | None = None,
    progress: bool = False,
) -> TaughtSource:
    """The data with the answers of a teacher in the place of its own, if it has any.

    Args:
        opened: conversations, or questions without answers.
        processor: of teacher and student.
        directory: of the run, where answers are kept; nowhere without one.
        progress: show it on standard error.

    Raises:
        GracecError: if it is no such data; if answers were kept there that something else decided.
    """
    if is_plain_text(opened):
        raise GracecError(
            "plain text asks nothing that a teacher could answer",
            where=opened.name,
            fix="give questions, or use training.answers: data with labels: all",
        )
    data = read_conversations(opened, strict=strict, answered=False)
    asker = _Asker(data, teacher, Collator(processor, teacher, None, strict), rule)
    ranked = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
    kept = None if directory is None else _Kept.open(directory / ANSWERS, rank, asker.fingerprint())
    given: dict[int, list[Answer]] = {index: [] for index in range(len(data))}
    said = {index: data.said(index) for index in given}
    left = {index: len(wanted(turns)) for index, turns in said.items()}
    done, total = 0, sum(left.values())
    with shown(progress and rank == 0, "the teacher answers", total) as show:
        for number in range(max(left.values(), default=0)):
            own: dict[int, Answer] = {}
            indices = [index for index in given if left[index] > number and _goes_on(given[index])]
            batches = _in_parts(indices, rule.micro_batch_size)
            for at in range(rank, len(batches), ranks):
                found = kept.find(number, at, batches[at]) if kept is not None else None
                if found is None:
                    found = asker.answer(batches[at], given)
                    if kept is not None:
                        kept.add(number, at, batches[at], found)
                own |= dict(zip(batches[at], found, strict=True))
                done = min(done + len(found) * ranks, total)
                show(f"the teacher answered {done}/{total}", done, total, due=done == total)
            for index, answer in _of_all_ranks(own, ranks).items():
                given[index].append(answer)
    found_in = {i: [one for one in own if isinstance(one, Reply)] for i, own in given.items()}
    whole = {index: own for index, own in found_in.items() if len(own) == left[index]}
    return TaughtSource(
        opened,
        {data.record(index): tuple(own) for index, own in whole.items()},
        {data.record(index): _reason(given[index][-1]) for index in given.keys() - whole.keys()},
        _summary(said, whole, rule.max_new_tokens),
    )


def answers_kept(directory: Path) -> list[Path]:
    """The files of answers in the directory of a run."""
    return sorted((directory / ANSWERS).glob("[0-9]*.jsonl"))


@dataclass(frozen=True)
class _Asker:
    """Asks a teacher."""

    data: TrainData
    teacher: PreTrainedModel
    collate: Collator
    rule: Training

    def answer(self, indices: Sequence[int], before: dict[int, list[Answer]]) -> list[Answer]:
        """The next answers of some conversations: a reply, or why there is none."""
        found: dict[int, Answer] = {}
        asked: dict[int, Sample] = {}
        for index in indices:
            sample = self.data.sample(index)
            reason = self.collate.refusal(sample) if isinstance(sample, Sample) else sample.reason
            if reason or not isinstance(sample, Sample):
                found[index] = reason
                continue
            said = [one for one in before[index] if isinstance(one, Reply)]
            turns = answered(sample.turns, said)
            images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
            asked[index] = Sample(turns, sample.images[:images], sample.where)
        if asked:
            found |= dict(zip(asked, self._together(list(asked.values())), strict=True))
        return [found[index] for index in indices]

    def _together(self, samples: Sequence[Sample]) -> list[Answer]:
        try:
            return list(
                replies(
                    self.teacher,
                    self.collate.processor,
                    [messages(sample.turns, sample.images) for sample in samples],
                    names=[sample.name for sample in samples],
                    max_new_tokens=self.rule.max_new_tokens,
                    positions=positions_of(self.teacher),
                )
            )
        except GracecError as error:
            if len(samples) == 1:
                if self.collate.strict:
                    raise
                return [error.what]
            return [answer for one in samples for answer in self._together([one])]

    def fingerprint(self) -> Fingerprint:
        """Of everything that decides the answers."""
        settings = {
            "max_new_tokens": self.rule.max_new_tokens,
            "micro_batch_size": self.rule.micro_batch_size,
        }
        processor = json.loads(self.collate.processor.to_json_string())
        return Fingerprint(
            model="",
            teacher=fingerprint_of_tensors(dict(self.teacher.named_parameters())),
            data=self.data.fingerprint,
            processor=fingerprint_of_json(processor),
            recipe=fingerprint_of_json(settings),
            device=describe_device(self.teacher.device),
        )


@dataclass
class _Kept:
    """Answers in files, one of each rank; a line that was not written to its end is dropped."""

    file: Path
    batches: dict[tuple[int, int], list[_Answer]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, rank: int, fingerprint: Fingerprint) -> _Kept:
        kept = cls(folder / f"{rank}.jsonl")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in answers_kept(folder.parent):
                kept._read(file, fingerprint)
            if not kept.file.exists():
                kept._append(_Head(fingerprint=FingerprintFields(**asdict(fingerprint))))
        except OSError as error:
            raise cannot_write(folder, error) from error
        return kept

    def find(self, number: int, batch: int, indices: Sequence[int]) -> list[Answer] | None:
        """The answers of a batch, if they are known."""
        found = self.batches.get((number, batch))
        if found is None or [one.sample for one in found] != list(indices):
            return None
        return [one.refused or Reply(one.text, one.tokens, one.complete) for one in found]

    def add(
        self, number: int, batch: int, indices: Sequence[int], answers: Sequence[Answer]
    ) -> None:
        """Keep the answers of a batch."""
        fields = [
            _Answer(sample=index, **asdict(one))
            if isinstance(one, Reply)
            else _Answer(sample=index, refused=one)
            for index, one in zip(indices, answers, strict=True)
        ]
        try:
            self._append(_Batch(round=number, batch=batch, answers=fields))
        except OSError as error:
            raise cannot_write(self.file, error) from error

    def _append(self, line: JsonModel) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(line.model_dump_json() + "\n")

    def _read(self, file: Path, expected: Fingerprint) -> None:
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content and file == self.file:
            with file.open("r+b") as stream:
                stream.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            if file == self.file:
                file.unlink()
            return
        where = str(file)
        head, *rest = (parse_json(line, where=where, fix=_REMOVE) for line in lines)
        found = check_fields(_Head, head, where=where, fix=_REMOVE)
        written = Fingerprint(**found.fingerprint.model_dump())
        difference = written.difference(expected)
        if difference:
            raise GracecError(difference, where=where, fix=written.remedy(expected))
        for one in rest:
            batch = check_fields(_Batch, one, where=where, fix=_REMOVE)
            self.batches[batch.round, batch.batch] = batch.answers


def _reason(last: Answer) -> str:
    return last if isinstance(last, str) else EMPTY


def _goes_on(answers: Sequence[Answer]) -> bool:
    """Whether a conversation can go on after its answers so far."""
    return all(isinstance(one, Reply) and one.text for one in answers)


def _in_parts(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[at : at + size] for at in range(0, len(indices), size)]


def _of_all_ranks(own: dict[int, Answer], ranks: int) -> dict[int, Answer]:
    if ranks == 1:
        return own
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    return {index: answer for part in parts for index, answer in part.items()}


def _summary(
    said: Mapping[int, Sequence[Turn]], given: Mapping[int, list[Reply]], limit: int
) -> dict[str, Any]:
    every = [reply for own in given.values() for reply in own]
    shown = [index for index in given if given[index][0].text][:EXAMPLES]
    asked = {index: said[index][wanted(said[index])[0] - 1].text for index in shown}
    return {
        "conversations": len(given),
        "answers": len(every),
        "replaced": sum(said[index][-1].role == "assistant" for index in given),
        "longest": max((reply.tokens for reply in every), default=0),
        "cut": sum(not reply.complete for reply in every),
        "limit": limit,
        "examples": [
            {"question": short(asked[index]), "answer": short(given[index][0].text)}
            for index in shown
        ],
    }
