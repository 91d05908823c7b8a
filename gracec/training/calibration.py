"""Samples to watch activations on, from the data that a model is trained or calibrated with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.data.collate import Collator, EmptyBatch
from gracec.data.conversations import open_train_data, open_with_held_out
from gracec.errors import GracecError
from gracec.recipe import Recipe

CALIBRATION_SAMPLES = 128


def calibration_samples(
    model: PreTrainedModel,
    recipe: Recipe,
    processor: Any,
    train_data: Any,
    eval_data: Any = None,
    strict: bool = False,
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Inputs of the graph to watch activations on, one sample each, so that nothing is padding.

    They are evenly spaced in what is trained on, or in all of `train_data` where nothing is.

    Returns:
        The inputs, without those about images for a text alone, and a line for each sample that
        could not be used and for what is to be known of the data.

    Raises:
        GracecError: if the data cannot be read or none of it can be used.
    """
    if processor is None:
        raise GracecError("calibration needs the model's processor", fix="pass processor=")
    if recipe.training is not None:
        rule = recipe.training
        data, _ = open_with_held_out(train_data, eval_data, rule.held_out, rule.seed, strict=strict)
    else:
        data = open_train_data(train_data, strict=strict)
    length = recipe.training.max_length if recipe.training is not None else None
    collate = Collator(processor, model, length, strict)
    count = min(CALIBRATION_SAMPLES, len(data))
    found = []
    for number in range(count):
        with suppress(EmptyBatch):
            batch = collate([data.sample(number * len(data) // count)])
            family = family_of(model)
            inputs = family.prepare(model, batch)
            if family.without_images(model, batch):  # nothing of an image is to be watched
                inputs = {name: inputs[name] for name in family.text}
            found.append({name: tensor.to(model.device) for name, tensor in inputs.items()})
    if not found:
        raise GracecError("no sample can be used to calibrate on", where="train_data")
    return found, [*data.problems, *data.notes, *collate.problems]
