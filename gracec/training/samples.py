"""What a training takes its samples from: conversations, or plain text where nothing is answered.

one, held_out = open_samples(train_data, eval_data, rule, collate)
batch = one.batch([3, 1, 2])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gracec.data.collate import PICTURES, Batch, Collator, picture_digest
from gracec.data.conversations import (
    BrokenSample,
    TrainData,
    is_plain_text,
    read_conversations,
)
from gracec.data.sources import Source, open_source
from gracec.data.text import WINDOW, TextWindows, read_text_windows
from gracec.recipe import Training


@dataclass(frozen=True)
class Samples:
    """Batches of samples by number.

    Attributes:
        answered: whether answers are what is learned; otherwise nothing is labelled.
    """

    data: TrainData | TextWindows
    collate: Collator
    answered: bool

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """These samples, as a `Collator` returns them.

        Raises:
            EmptyBatch: if all are broken.
            GracecError: as `Collator` does.
        """
        if isinstance(self.data, TextWindows):
            batch = self.data.batch(numbers)
            if self.collate.names_pictures:
                batch[PICTURES] = torch.stack([picture_digest(())] * len(numbers))
            return batch
        samples = [self.data.sample(number) for number in numbers]
        return self.collate(samples) if self.answered else self.collate.unlabelled(*samples)

    def learn(self, broken: Iterable[tuple[int, BrokenSample]], problems: Iterable[str]) -> None:
        """Take in what another process found broken, as if it had shown here.

        Raises:
            GracecError: in strict mode, or if too much is broken now.
        """
        if isinstance(self.data, TrainData):
            for number, sample in broken:
                self.data.learn_broken(number, sample)
        for line in problems:
            self.collate.learn(line)


def open_samples(
    train_data: Any, eval_data: Any, rule: Training, collate: Collator
) -> tuple[Samples, Samples]:
    """Samples to train on, and those that choose the best state.

    Args:
        train_data, eval_data: what `open_train_data` takes; plain text too, and questions without
            answers, where every token counts. Without `eval_data` a part of the former is held out.

    Raises:
        GracecError: if they cannot be read.
    """
    answered = rule.labels == "answers"
    data = read_samples(open_source(train_data), collate, answered=answered)
    if eval_data is None:
        parts: tuple[TrainData | TextWindows, ...] = data.split(rule.held_out, rule.seed)
    else:
        parts = (data, read_samples(open_source(eval_data), collate, answered=answered))
    one, held_out = (Samples(part, collate, answered) for part in parts)
    return one, held_out


def read_samples(opened: Source, collate: Collator, *, answered: bool) -> TrainData | TextWindows:
    """The conversations of a source or, if they need no answers, its windows of plain text.

    Windows are as long as the model and `max_length` of the collator have room for.
    """
    if not answered and is_plain_text(opened):
        length = min(WINDOW, positions_of(collate.model), collate.max_length or WINDOW)
        return read_text_windows(opened, collate.processor, length, strict=collate.strict)
    return read_conversations(opened, strict=collate.strict, answered=answered)


def positions_of(model: nn.Module) -> int:
    """How many tokens a model has positions for; very many if it does not say."""
    config: Any = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else 1 << 30
