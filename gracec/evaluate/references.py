"""Conversations as questions: the last answer of each is what a model is expected to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gracec.data.conversations import Sample, TrainData, open_train_data
from gracec.data.prompts import Message, messages, question_about
from gracec.data.questions import DEFAULT_TYPE, SAMPLES_FILE, VqaSample, load_samples, spread
from gracec.errors import GracecError


@dataclass(frozen=True)
class Reference:
    """The last answer of a conversation; all that is said before it is given to the model.

    Attributes:
        data, index: where the conversation is; its pictures are decoded when it is asked.
        answer: what is expected.
    """

    data: TrainData
    index: int
    answer: str
    type: str = DEFAULT_TYPE

    def messages(self) -> list[Message]:
        sample = self.data.sample(self.index)
        if not isinstance(sample, Sample):
            raise GracecError("it could be read before", where=str(sample))
        return messages(sample.turns[:-1], sample.images)


Question = VqaSample | Reference


def asked(question: Question) -> list[Message]:
    """What a model is given, with its pictures decoded."""
    if isinstance(question, Reference):
        return question.messages()
    return question_about(question.picture(), question.question)


def load_questions(
    source: str | Path, limit: int | None = None
) -> tuple[Sequence[Question], list[str]]:
    """What a model can be asked of a folder of questions, or of whatever it could be trained on.

    Every picture is decoded once, to see that it can be.

    Args:
        source: what `load_samples` takes, or `open_train_data`: also a dataset of the Hub.
        limit: take at most so many, drawn at random, the same ones every time.

    Returns:
        The questions, and a line for each record that is left out because it is broken.

    Raises:
        GracecError: if there are none, or most of the data is broken.
    """
    path = Path(source)
    if (path / SAMPLES_FILE).is_file() or (path.is_dir() and not any(path.iterdir())):
        return load_samples(path, limit), []
    data = open_train_data(source)
    numbers: Sequence[int] = range(len(data))
    if limit is not None:
        numbers = spread([DEFAULT_TYPE] * len(data), limit)
    found = []
    for number in numbers:
        sample = data.sample(number)
        if isinstance(sample, Sample):
            found.append(Reference(data, number, sample.turns[-1].text))
    if not found:
        raise GracecError("no record can be asked", where=str(source), fix="mend the data")
    return found, data.problems
