"""An image as a whole and in tiles, whose features are put together again: unpadded, with a token
at the end of each row.

Which feature becomes which token depends on the size of the image. The host computes it as indices
into all features, so that the graph gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from gracec.capture.families.base import Dims, Inputs
from gracec.capture.families.llava import Llava

SIZES = "image_sizes"
FEATURES = "feature_indices"
ROW_END = -1
"""In the indices of one image; in those of all it is the index behind the last feature."""

Grid = tuple[int, int]
"""Rows and columns of the tiles of an image."""


class Tiled(Llava):
    """`pixel_values` are all tiles [P, 3, S, S], the whole of each image before its tiles; token n
    is the feature `FEATURES` [N]. The last index is that of the row end."""

    vision: ClassVar[Dims] = {"pixel_values": (0,), FEATURES: (0,)}
    computed: ClassVar[tuple[str, ...]] = (SIZES,)
    serving: ClassVar[dict[str, dict[int, str]]] = {
        "pixel_values": {0: "num_tiles"},
        FEATURES: {0: "num_image_tokens"},
    }

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        return self.features(model, inputs)[inputs[FEATURES]]

    def features(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        """Features [F + 1, H] of all tiles, and that of a row end."""
        newline: Tensor = model.model.image_newline
        features = super().encode(model, inputs)
        return torch.cat([features, newline.unsqueeze(0).to(features.dtype)])

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        grids = self.tile_grids(model, batch)
        counts = [1 if grid is None else 1 + grid[0] * grid[1] for grid in grids]
        pixels = batch["pixel_values"]
        if pixels.dim() == 5:  # padded to the image with the most tiles
            tiles = zip(pixels, counts, strict=True)
            pixels = torch.cat([image[:count] for image, count in tiles])
        indices = self.each_image(model, batch, self.feature_index)
        newline, start, found = sum(counts) * tile_side(model) ** 2, 0, []
        for index, count in zip(indices, counts, strict=True):
            found.append(torch.where(index == ROW_END, newline, index + start))
            start += count * tile_side(model) ** 2
        return {"pixel_values": pixels, FEATURES: torch.cat(found).to(pixels.device)}

    def each_image(
        self,
        model: PreTrainedModel,
        batch: Inputs,
        compute: Callable[[PreTrainedModel, Grid | None, list[int]], Tensor],
    ) -> list[Tensor]:
        """What `compute` says of the grid and the size of each image."""
        grids, sizes = self.tile_grids(model, batch), batch[SIZES].tolist()
        return [compute(model, grid, size) for grid, size in zip(grids, sizes, strict=True)]

    def tile_grids(self, model: PreTrainedModel, batch: Inputs) -> list[Grid | None]:
        """The grid of each image; None for one that is looked at as a whole only."""
        config = model.config
        pinpoints, tile = config.image_grid_pinpoints, config.vision_config.image_size
        sizes = self.required(batch, SIZES).tolist()
        return [get_anyres_image_grid_shape(size, pinpoints, tile) for size in sizes]

    def feature_index(self, model: PreTrainedModel, grid: Grid | None, size: list[int]) -> Tensor:
        """The feature int64 [N] of one image that each token is, or `ROW_END`."""
        whole = torch.arange(tile_side(model) ** 2)
        if grid is None:
            return torch.cat([whole, torch.tensor([ROW_END])])
        picture = picture_index(model, grid, size)
        lines = torch.nn.functional.pad(picture, (0, 1), value=ROW_END)
        return torch.cat([whole, lines.flatten()])

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        return [len(index) for index in self.each_image(model, batch, self.feature_index)]

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        edge = model.config.vision_config.image_size
        shapes = [(edge, edge), (edge, 2 * edge), (edge + 8, edge)]
        sizes = torch.tensor((shapes * images)[:images])
        grids = self.tile_grids(model, {SIZES: sizes})
        most = max(1 + grid[0] * grid[1] for grid in grids if grid is not None)
        pixels = torch.randn((images, most, 3, edge, edge), generator=generator)
        return {"pixel_values": pixels, SIZES: sizes}


def tile_side(model: PreTrainedModel) -> int:
    """Rows of features of a tile, and columns."""
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)


def picture_index(model: PreTrainedModel, grid: Grid, size: list[int]) -> Tensor:
    """Which features of an image show it, int64 [height, width]: those of its tiles in their
    places, without those of padding. The features of the image as a whole come first."""
    (rows, columns), side = grid, tile_side(model)
    tiles = torch.arange(rows * columns * side**2).view(rows, columns, side, side) + side**2
    picture = tiles.transpose(1, 2).reshape(rows * side, columns * side)
    found: Tensor = unpad_image(picture.unsqueeze(0), size)[0]
    return found
