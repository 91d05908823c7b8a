"""Samples that a model is calibrated on: synthetic ones, and those of the user's data."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.data.collate import Collator, EmptyBatch
from gracec.data.conversations import open_train_data, open_with_held_out
from gracec.errors import GracecError
from gracec.recipe import Recipe

CALIBRATION_SAMPLES = 128
SYNTHETIC_TEXT = 384
"""Most text tokens of a synthetic sample."""
SYNTHETIC_VISUAL = 64
"""Visual tokens that the pictures of a synthetic sample come to, where one of them has fewer."""
MOST_PICTURES = 8


def synthetic_samples(
    model: PreTrainedModel, *, tokens: int = 3072, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Inputs of the graph from nothing but the configuration: random words and noise for pictures.

    Each sample is one prompt without padding: at most `SYNTHETIC_TEXT` text tokens, fewer if the
    model has fewer positions, around pictures that come to about `SYNTHETIC_VISUAL` visual tokens.

    Args:
        tokens: text tokens of all samples together; visual ones come on top.
        seed: of words and pixels.
    """
    family = family_of(model)
    generator = torch.Generator().manual_seed(seed)
    positions = _positions(model)
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


def _positions(model: PreTrainedModel) -> int:
    """Tokens that a model has positions for; without a number, as many as anybody asks for."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else 1 << 30


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
