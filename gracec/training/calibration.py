"""Samples that a model is calibrated on: synthetic ones, and those of the user's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.data.collate import Batch, Collator, EmptyBatch
from gracec.data.conversations import (
    Sample,
    TrainData,
    draw_apart,
    epoch_order,
)
from gracec.data.sources import open_source
from gracec.data.text import TextWindows
from gracec.errors import GracecError
from gracec.recipe import Calibration, Recipe
from gracec.training.samples import positions_of, read_samples

Inputs: TypeAlias = dict[str, Tensor]

ALL_HELD_OUT = "everything in train_data is in eval_data as well"
HELD_OUT = 8
"""One sample in so many is held out of the second moments."""
SYNTHETIC_TEXT = 384
"""Most text tokens of a synthetic sample."""
SYNTHETIC_VISUAL = 64
"""Visual tokens that the pictures of a synthetic sample come to, where one of them has fewer."""
MOST_PICTURES = 8


def synthetic_samples(model: PreTrainedModel, *, tokens: int = 3072, seed: int = 0) -> list[Inputs]:
    """Inputs of the graph from nothing but the configuration: random words and noise for pictures.

    Each sample is one prompt without padding: at most `SYNTHETIC_TEXT` text tokens, fewer if the
    model has fewer positions, around pictures that come to about `SYNTHETIC_VISUAL` visual tokens.

    Args:
        tokens: text tokens of all samples together; visual ones come on top.
        seed: of words and pixels.
    """
    family = family_of(model)
    generator = torch.Generator().manual_seed(seed)
    positions = positions_of(model)
    images = min(MOST_PICTURES, max(1, SYNTHETIC_VISUAL // _visual_tokens(model, 1)))
    if 2 * _visual_tokens(model, images) > positions:
        images = 1
    longest = min(SYNTHETIC_TEXT, positions - _visual_tokens(model, images))
    found = []
    while tokens > 0:
        text = max(images + 1, min(longest, tokens))  # a word beside each picture
        batch = family.example_batch(model, batch=1, images=images, text=text, generator=generator)
        found.append(family.prepare(model, batch))
        tokens -= text
    return found


def _visual_tokens(model: PreTrainedModel, images: int) -> int:
    family = family_of(model)
    pictures = family.example_images(model, images, torch.Generator().manual_seed(0))
    return max(1, sum(family.image_tokens(model, pictures)))


@dataclass(frozen=True)
class Drawn:
    """Samples to calibrate weights on.

    Attributes:
        samples: what second moments are of; never empty.
        held_out: about an eighth of what was drawn, for gates and choices. No picture is on both
            sides, unless all samples are about one. Empty if only one sample was drawn.
    """

    samples: tuple[Inputs, ...]
    held_out: tuple[Inputs, ...]


@dataclass(frozen=True)
class CalibrationData:
    """What a model is calibrated on, opened once: inputs of the graph by number.

    Every sample is one prompt, so that nothing is padding. Conversations are whole, however long,
    unless `training.max_length` of the recipe says otherwise. One without pictures has no inputs
    about them: nothing of an image is to be looked at.
    """

    model: PreTrainedModel
    rule: Calibration
    data: TrainData | TextWindows
    collate: Collator
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.data)

    def spaced(self) -> list[Inputs]:
        """Up to `calibration.samples` of them, evenly spaced: activations are observed on these.

        Raises:
            GracecError: if none can be used.
        """
        count = min(self.rule.samples, len(self))
        found = [self.inputs(number * len(self) // count) for number in range(count)]
        return self._usable([inputs for inputs in found if inputs is not None])

    def drawn(self) -> Drawn:
        """Samples that the seed draws without replacement, in the order of the data.

        The drawing ends with `calibration.samples` of them, or before the first that would exceed
        `calibration.tokens`; one is always drawn.

        Raises:
            GracecError: if none can be used.
        """
        found: dict[int, Inputs] = {}
        tokens = 0
        for number in epoch_order(len(self), 0, self.rule.seed):
            inputs = self.inputs(number)
            if inputs is None:
                continue
            tokens += inputs["input_ids"].numel()
            if found and tokens > self.rule.tokens:
                break
            found[number] = inputs
            if len(found) == self.rule.samples:
                break
        chosen = sorted(self._usable(list(found)))
        held = self._held_out(chosen)
        return Drawn(
            tuple(found[number] for number in chosen if number not in held),
            tuple(found[number] for number in chosen if number in held),
        )

    def inputs(self, number: int) -> Inputs | None:
        """Sample `number` as the graph takes it, on the model's device; None if it is broken."""
        try:
            batch = self._batch(number)
        except EmptyBatch:
            return None
        family = family_of(self.model)
        inputs = family.prepare(self.model, batch)
        if family.without_images(self.model, batch):
            inputs = {name: inputs[name] for name in family.text}
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    @property
    def notes(self) -> list[str]:
        """A line for each sample that could not be used, and for what is to be known of the data.

        Some show only when the samples are read.
        """
        return [*self.warnings, *self.data.problems, *self.data.notes, *self.collate.problems]

    def _batch(self, number: int) -> Batch:
        if isinstance(self.data, TextWindows):
            return self.data.batch([number])
        sample = self.data.sample(number)
        asks = isinstance(sample, Sample) and sample.turns[-1].role != "assistant"
        return self.collate.unlabelled(sample) if asks else self.collate([sample])

    def _usable(self, found: list[Any]) -> list[Any]:
        if not found:
            raise GracecError("no sample can be used to calibrate on", where="train_data")
        return found

    def _held_out(self, numbers: Sequence[int]) -> set[int]:
        if len(numbers) < 2:
            return set()
        count = max(1, len(numbers) // HELD_OUT)
        if isinstance(self.data, TextWindows):
            keys: list[tuple[int, ...]] = [()] * len(numbers)
        else:
            keys = [self.data.pictures(number) for number in numbers]
        places = draw_apart(keys, count, self.rule.seed)
        if len(places) == len(numbers):  # all about one picture
            places = list(range(len(numbers) - count, len(numbers)))
        return {numbers[place] for place in places}


def calibration_data(
    model: PreTrainedModel,
    recipe: Recipe,
    processor: Any,
    train_data: Any,
    eval_data: Any = None,
    strict: bool = False,
) -> CalibrationData:
    """Open what a model is calibrated on.

    A recipe that trains calibrates on what it trains on, without what it holds out. One that needs
    no answers may be given plain text and questions without answers as well.

    Args:
        eval_data: conversations or questions that are held out: what has a picture in common with
            them, and texts that are among them, are not calibrated on.

    Raises:
        GracecError: if there is no processor, or if the data cannot be read; if it is all held out,
            and not trained on either.
    """
    if processor is None:
        raise GracecError("calibration needs the model's processor", fix="pass processor=")
    rule = recipe.training
    collate = Collator(processor, model, None if rule is None else rule.max_length, strict)
    opened, answered = open_source(train_data), rule is not None and rule.labels == "answers"
    data = read_samples(opened, collate, answered=answered)
    if eval_data is not None and isinstance(data, TrainData):
        held = read_samples(open_source(eval_data), collate, answered=answered)
        apart = data.without(held) if isinstance(held, TrainData) else data
        if not len(apart) and rule is None:
            raise GracecError(
                ALL_HELD_OUT, where=opened.name, fix="give other data to calibrate on"
            )
        if not len(apart):  # it is trained on that as well
            return CalibrationData(model, recipe.calibration, data, collate, (ALL_HELD_OUT,))
        data = apart
    elif rule is not None and eval_data is None:
        data, _ = data.split(rule.held_out, rule.seed)
    return CalibrationData(model, recipe.calibration, data, collate)
