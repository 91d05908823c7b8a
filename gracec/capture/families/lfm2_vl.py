"""LFM2-VL: tiles and images as patches that are padded to the same number, learned positions that
are resized to the shape of each; a decoder most of whose blocks have a short convolution.

Which patches become which token depends on the shape of an image. The host computes it as indices
into all patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.errors import GracecError
from gracec.quant.ops_positions import resized_positions

SHAPES, MASK, TOKENS = "spatial_shapes", "pixel_attention_mask", "patch_indices"


class Lfm2VL(Family):
    """`pixel_values` are [I, P, 3 * S * S]; token n is made of the patches `TOKENS` [N, F * F] of
    all images [I * P], row by row."""

    model_type: ClassVar[str] = "lfm2_vl"
    vision: ClassVar[Dims] = {"pixel_values": (0, 1), MASK: (0, 1), SHAPES: (0,), TOKENS: (0,)}
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: short convolutions have states that each step replaces, and the "
        "decoder graph has keys and values that grow"
    )

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        tower, projector = parts.vision_tower, parts.multi_modal_projector
        with _one_operator(tower.embeddings):
            hidden = tower(
                pixel_values=inputs["pixel_values"],
                pixel_attention_mask=inputs[MASK],
                spatial_shapes=inputs[SHAPES],
            ).last_hidden_state
        patches = hidden.flatten(0, 1)[inputs[TOKENS]].flatten(1)
        if projector.use_layer_norm:
            patches = projector.layer_norm(patches)
        features: Tensor = projector.linear_2(projector.act(projector.linear_1(patches)))
        return features

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        pixels, shapes = batch["pixel_values"], self.required(batch, SHAPES)
        factor, length = model.config.downsample_factor, pixels.shape[1]
        tokens = []
        for image, (rows, columns) in enumerate(shapes.tolist()):
            patches = torch.arange(rows * columns).view(rows // factor, factor, -1, factor)
            tokens.append(patches.transpose(1, 2).reshape(-1, factor**2) + image * length)
        return {
            "pixel_values": pixels,
            MASK: self.required(batch, MASK),
            SHAPES: shapes,
            TOKENS: torch.cat(tokens).to(pixels.device),
        }

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        factor = model.config.downsample_factor
        counts: list[int] = (self.required(batch, SHAPES).prod(-1) // factor**2).tolist()
        return counts

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        shapes, known = self.required(batch, SHAPES), self.required(batch, MASK)
        if not torch.equal(shapes.prod(-1), known.sum(-1)):
            raise GracecError(
                f"{SHAPES} say {shapes.prod(-1).tolist()} patches, {MASK} has "
                f"{known.sum(-1).tolist()}",
                where=f"batch, {SHAPES}",
                fix="use the processor",
            )
        if (shapes % model.config.downsample_factor).any():
            raise GracecError(
                f"{SHAPES} are {shapes.tolist()}, no multiples of "
                f"{model.config.downsample_factor}: patches are merged into tokens",
                where=f"batch, {SHAPES}",
                fix="use the model's own processor",
            )

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        config, factor = model.config.vision_config, model.config.downsample_factor
        shapes = factor * torch.tensor(([(2, 2), (2, 3), (4, 1)] * images)[:images])
        length = 6 * factor**2
        known = torch.arange(length) < shapes.prod(-1, keepdim=True)
        size = (images, length, config.num_channels * config.patch_size**2)
        pixels = torch.randn(size, generator=generator) * known.unsqueeze(-1)
        return {"pixel_values": pixels, MASK: known.int(), SHAPES: shapes}


@contextmanager
def _one_operator(embeddings: Any) -> Iterator[None]:
    """The model's own interpolation has sizes that depend on the shapes of images."""

    def resize(positions: Tensor, shapes: Tensor, max_length: int) -> Tensor:
        found: Tensor = resized_positions(positions, shapes, max_length)
        return found

    embeddings.resize_positional_embeddings = resize
    try:
        yield
    finally:
        del embeddings.resize_positional_embeddings
