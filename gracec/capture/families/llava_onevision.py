"""LLaVA-OneVision: an image as a whole and in tiles, whose features are put together again,
unpadded, scaled down if there are too many, with a token at the end of each row.

Which features become which token depends on the size of the image. The host computes it as indices
into all features, and weights where features are scaled down.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from gracec.capture.families.base import Dims, Inputs
from gracec.capture.families.llava import Llava

SIZES, COUNTS = "image_sizes", "batch_num_images"
TAPS, WEIGHTS = "feature_indices", "feature_weights"
SCALED_ABOVE = 1.1
"""Features are scaled down when a side has this many times the most."""


class LlavaOnevision(Llava):
    """`pixel_values` are all tiles [P, 3, S, S]; token n is the sum of the features `TAPS` [N, 4]
    times `WEIGHTS` [N, 4]. The last index is that of the row end."""

    model_type: ClassVar[str] = "llava_onevision"
    vision: ClassVar[Dims] = {"pixel_values": (0,), TAPS: (0,), WEIGHTS: (0,)}
    computed: ClassVar[tuple[str, ...]] = (SIZES, COUNTS)
    serving: ClassVar[dict[str, dict[int, str]]] = {}
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: no client computes which features become which token"
    )

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        newline: Tensor = model.model.image_newline
        features = super().encode(model, inputs)
        table = torch.cat([features, newline.unsqueeze(0).to(features.dtype)])
        taken = table[inputs[TAPS]].float() * inputs[WEIGHTS].unsqueeze(-1)
        return taken.sum(1).to(features.dtype)

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        grids = self.tile_grids(model, batch)
        counts = [1 if grid is None else 1 + grid[0] * grid[1] for grid in grids]
        pixels = batch["pixel_values"]
        if pixels.dim() == 5:  # padded to the image with the most tiles
            tiles = zip(pixels, counts, strict=True)
            pixels = torch.cat([image[:count] for image, count in tiles])
        images = [
            self.feature_taps(model, grid, size)
            for grid, size in zip(grids, batch[SIZES].tolist(), strict=True)
        ]
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        newline, start, taps = sum(counts) * side**2, 0, []
        for (index, _), count in zip(images, counts, strict=True):
            taps.append(torch.where(index < 0, newline, index + start))
            start += count * side**2
        weights = torch.cat([weight for _, weight in images]).to(pixels.device)
        return {
            "pixel_values": pixels,
            TAPS: torch.cat(taps).to(pixels.device),
            WEIGHTS: weights,
        }

    def tile_grids(self, model: PreTrainedModel, batch: Inputs) -> list[tuple[int, int] | None]:
        """Rows and columns of the tiles of each image; None for one of several in a prompt, which
        is looked at as a whole only."""
        config = model.config
        counts = batch.get(COUNTS)
        sizes = self.required(batch, SIZES).tolist()
        alone = [True] * len(sizes)
        if counts is not None:
            alone = [int(count) == 1 for count in counts for _ in range(int(count))]
        pinpoints, tile = config.image_grid_pinpoints, config.vision_config.image_size
        return [
            get_anyres_image_grid_shape(size, pinpoints, tile) if tiled else None
            for size, tiled in zip(sizes, alone, strict=True)
        ]

    def feature_taps(
        self, model: PreTrainedModel, grid: tuple[int, int] | None, size: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Indices int64 [N, 4] into the features of one image, -1 for a row end; weights [N, 4]."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        whole = _single(torch.arange(side**2))
        if grid is None:
            return _joined([whole, _single(torch.tensor([-1]))])
        rows, columns = grid
        tiles = torch.arange(rows * columns * side**2).view(rows, columns, side, side) + side**2
        picture = tiles.transpose(1, 2).reshape(rows * side, columns * side)
        picture = unpad_image(picture.unsqueeze(0), size)[0]
        most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        height, width = picture.shape
        ratio = math.sqrt(height * width / (most * side**2))
        if ratio > SCALED_ABOVE:
            found = _scaled(picture, int(height // ratio), int(width // ratio))
        else:
            taps, shares = _single(picture.flatten())
            found = taps.view(height, width, 4), shares.view(height, width, 4)
        ends = _single(torch.full((len(found[0]),), -1))
        lines, weights = (
            torch.cat([part, end.unsqueeze(1)], 1).flatten(0, 1)
            for part, end in zip(found, ends, strict=True)
        )
        return _joined([whole, (lines, weights)])

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        grids, sizes = self.tile_grids(model, batch), batch[SIZES].tolist()
        return [
            len(self.feature_taps(model, grid, size)[0])
            for grid, size in zip(grids, sizes, strict=True)
        ]

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        config: Any = model.config
        edge = config.vision_config.image_size
        shapes = [(edge, edge), (edge, 2 * edge), (edge + 8, edge)]
        sizes = torch.tensor((shapes * images)[:images])
        grids = self.tile_grids(model, {SIZES: sizes})
        most = max(1 + grid[0] * grid[1] for grid in grids if grid is not None)
        pixels = torch.randn((images, most, 3, edge, edge), generator=generator)
        return {"pixel_values": pixels, SIZES: sizes}


def _single(index: Tensor) -> tuple[Tensor, Tensor]:
    """Taps of which only the first counts."""
    weights = torch.zeros((len(index), 4))
    weights[:, 0] = 1
    return index.unsqueeze(1).expand(-1, 4), weights


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([index for index, _ in parts]), torch.cat([weight for _, weight in parts])


def _scaled(picture: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation of features at these indices: taps and weights [height, width, 4]."""
    axes = []
    for size, wanted in zip(picture.shape, (height, width), strict=True):
        place = ((torch.arange(wanted) + 0.5) * (size / wanted) - 0.5).clamp(min=0)
        low = place.long()
        high = (low + 1).clamp(max=size - 1)
        axes.append((torch.stack([low, high], 1), torch.stack([1 - place + low, place - low], 1)))
    (rows, by_row), (columns, by_column) = axes
    taps = picture[rows[:, None, :, None], columns[None, :, None, :]]
    weights = by_row[:, None, :, None] * by_column[None, :, None, :]
    return taps.flatten(2), weights.flatten(2)
