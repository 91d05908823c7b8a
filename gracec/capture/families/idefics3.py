"""Idefics3: pictures cut into square images of one size, each of a fixed number of tokens.

A processor pads prompts with fewer images by images of zeros; they are dropped on the host.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.serving_graph import BATCH
from gracec.errors import GracecError

MASK = "pixel_attention_mask"


class Idefics3(Family):
    """`pixel_values` are [1, I, 3, S, S] and `pixel_attention_mask` bool [1, I, S, S]."""

    model_type: ClassVar[str] = "idefics3"
    vision: ClassVar[Dims] = {"pixel_values": (1,), MASK: (1,)}
    serving: ClassVar[dict[str, dict[int, str]]] = {
        "pixel_values": {0: BATCH, 1: "num_images"},
        MASK: {0: BATCH, 1: "num_images"},
    }

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        patch = model.config.vision_config.patch_size
        pixels, mask = inputs["pixel_values"].flatten(0, 1), inputs[MASK].flatten(0, 1)
        side = pixels.shape[-1] // patch
        mask = mask[:, : side * patch, : side * patch]
        seen = mask.view(-1, side, patch, side, patch).sum((2, 4)) > 0
        hidden = parts.vision_model(pixel_values=pixels, patch_attention_mask=seen)
        features: Tensor = parts.connector(hidden.last_hidden_state)
        return features.reshape(-1, features.shape[-1])

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        pixels = batch["pixel_values"].flatten(0, 1)
        mask = batch.get(MASK)
        mask = torch.ones_like(pixels[:, 0]) if mask is None else mask.flatten(0, 1)
        real = real_images(batch["pixel_values"])
        return {"pixel_values": pixels[real].unsqueeze(0), MASK: mask[real].bool().unsqueeze(0)}

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        config = model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        tokens = int(side**2 / config.scale_factor**2)
        return [tokens] * int(real_images(batch["pixel_values"]).sum())

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        size, shape = model.config.vision_config.image_size, tuple(batch["pixel_values"].shape)
        if len(shape) != 5 or shape[-2:] != (size, size):
            raise GracecError(
                f"pixel_values are {shape}, the tower takes [prompts, images, 3, {size}, {size}]",
                where="pixel_values",
                fix="use the model's own processor",
            )

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        vision = model.config.vision_config
        size = vision.image_size
        mask = torch.ones((1, images, size, size), dtype=torch.int64)
        mask[:, 1::3, size // 2 :] = 0  # a wide one
        mask[:, 2::3, :, size - vision.patch_size :] = 0  # a high one
        shape = (1, images, vision.num_channels, size, size)
        pixels = torch.randn(shape, generator=generator) * mask.unsqueeze(2)
        return {"pixel_values": pixels, MASK: mask}

    def serving_example(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.squeeze(0).unflatten(0, (2, -1)) for name, tensor in inputs.items()}


def real_images(pixels: Tensor) -> Tensor:
    """bool [B * I]: which of pixel_values [B, I, 3, S, S] are images and not padding."""
    return pixels.flatten(0, 1).flatten(1).any(1)
