"""Idefics2: images of any size, padded to one size, each resampled to a fixed number of tokens.

The host cuts off what fills no patch, and says which patches are of an image and not of padding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Inputs
from gracec.capture.families.idefics3 import MASK, Idefics3, real_images
from gracec.capture.serving_graph import BATCH
from gracec.errors import GracecError

PATCH_MASK = "patch_attention_mask"


class Idefics2(Idefics3):
    """`pixel_values` are [1, I, 3, H, W], and `PATCH_MASK` bool [1, I, rows, columns]."""

    model_type: ClassVar[str] = "idefics2"
    vision: ClassVar[Dims] = {"pixel_values": (1, 3, 4), PATCH_MASK: (1, 2, 3)}
    computed: ClassVar[tuple[str, ...]] = (MASK,)
    serving: ClassVar[dict[str, dict[int, str]]] = {
        "pixel_values": {0: BATCH, 1: "num_images", 3: "height", 4: "width"},
        PATCH_MASK: {0: BATCH, 1: "num_images", 2: "rows", 3: "columns"},
    }

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        pixels, whole = inputs["pixel_values"].flatten(0, 1), inputs[PATCH_MASK].flatten(0, 1)
        hidden = parts.vision_model(pixel_values=pixels, patch_attention_mask=whole)
        features: Tensor = parts.connector(
            hidden.last_hidden_state, attention_mask=whole.flatten(1)
        )
        return features.reshape(-1, features.shape[-1])

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        pixels, mask = super().vision_inputs(model, batch).values()
        patch = model.config.vision_config.patch_size
        whole = mask.unfold(2, patch, patch).unfold(3, patch, patch).all(-1).all(-1)
        height, width = (side * patch for side in whole.shape[2:])
        return {"pixel_values": pixels[..., :height, :width], PATCH_MASK: whole}

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        tokens = int(model.config.perceiver_config.resampler_n_latents)
        return [tokens] * int(real_images(batch["pixel_values"]).sum())

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        shape = tuple(batch["pixel_values"].shape)
        patch = model.config.vision_config.patch_size
        if len(shape) != 5 or min(shape[-2:]) < patch:
            raise GracecError(
                f"pixel_values are {shape}, the tower takes [prompts, images, 3, height, width], "
                f"no side shorter than {patch}",
                where="pixel_values",
                fix="use the model's own processor",
            )

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        vision = model.config.vision_config
        sides = [(3, 4), (4, 2), (2, 5)]
        sizes = vision.patch_size * torch.tensor((sides * images)[:images])
        height, width = sizes.amax(0).tolist()
        mask = torch.zeros((1, images, height, width), dtype=torch.int64)
        for image, (rows, columns) in zip(mask[0], sizes.tolist(), strict=True):
            image[:rows, :columns] = 1
        shape = (1, images, vision.num_channels, height, width)
        pixels = torch.randn(shape, generator=generator) * mask.unsqueeze(2)
        return {"pixel_values": pixels, MASK: mask}
