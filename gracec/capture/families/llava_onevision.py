"""LLaVA-OneVision: LLaVA-NeXT whose features are scaled down if there are too many, which the
host says by weights."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Inputs
from gracec.capture.families.tiles import (
    FEATURES,
    ROW_END,
    SIZES,
    Grid,
    Tiled,
    picture_index,
    tile_side,
)

COUNTS, WEIGHTS = "batch_num_images", "feature_weights"
SCALED_ABOVE = 1.1
"""Features are scaled down when a side has this many times the most."""


class LlavaOnevision(Tiled):
    """Token n is the sum of the features `FEATURES` [N, 4] times `WEIGHTS` [N, 4]."""

    model_type: ClassVar[str] = "llava_onevision"
    vision: ClassVar[Dims] = {**Tiled.vision, WEIGHTS: (0,)}
    computed: ClassVar[tuple[str, ...]] = (SIZES, COUNTS)
    serving: ClassVar[dict[str, dict[int, str]]] = {}
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: no client computes which features become which token"
    )

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        features = self.features(model, inputs)
        taken = features[inputs[FEATURES]].float() * inputs[WEIGHTS].unsqueeze(-1)
        return taken.sum(1).to(features.dtype)

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        found = super().vision_inputs(model, batch)
        weights = torch.cat(self.each_image(model, batch, self.feature_weights))
        return {**found, WEIGHTS: weights.to(found["pixel_values"].device)}

    def tile_grids(self, model: PreTrainedModel, batch: Inputs) -> list[Grid | None]:
        """None for one of several in a prompt, which is looked at as a whole only."""
        grids, counts = super().tile_grids(model, batch), batch.get(COUNTS)
        if counts is None:
            return grids
        alone = [int(count) == 1 for count in counts for _ in range(int(count))]
        return [grid if tiled else None for grid, tiled in zip(grids, alone, strict=True)]

    def feature_index(self, model: PreTrainedModel, grid: Grid | None, size: list[int]) -> Tensor:
        """Features int64 [N, 4]."""
        return self.feature_taps(model, grid, size)[0]

    def feature_weights(self, model: PreTrainedModel, grid: Grid | None, size: list[int]) -> Tensor:
        """Weights float32 [N, 4] of these features."""
        return self.feature_taps(model, grid, size)[1]

    def feature_taps(
        self, model: PreTrainedModel, grid: Grid | None, size: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Both. Features are scaled down if there are more than `vision_aspect_ratio` says."""
        if grid is not None:
            picture, side = picture_index(model, grid, size), tile_side(model)
            most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
            height, width = picture.shape
            ratio = math.sqrt(height * width / (most * side**2))
            if ratio > SCALED_ABOVE:
                scaled = _scaled(picture, int(height // ratio), int(width // ratio))
                ends = _single(torch.full((len(scaled[0]), 1), ROW_END))
                whole = _single(torch.arange(side**2))
                parts = zip(whole, scaled, ends, strict=True)
                taps, weights = (
                    torch.cat([first, torch.cat([lines, end], 1).flatten(0, 1)])
                    for first, lines, end in parts
                )
                return taps, weights
        return _single(super().feature_index(model, grid, size))


def _single(index: Tensor) -> tuple[Tensor, Tensor]:
    """Four taps of which only the first counts."""
    weights = torch.zeros((*index.shape, 4))
    weights[..., 0] = 1
    return index.unsqueeze(-1).expand(*index.shape, 4), weights


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
