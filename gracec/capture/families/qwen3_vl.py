"""Qwen3-VL: Qwen2-VL with learned positions in the tower, interpolated to the grid of each image,
and DeepStack: features of inner blocks are added to the visual tokens between decoder blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Inputs
from gracec.capture.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    model_type: ClassVar[str] = "qwen3_vl"
    serving: ClassVar[dict[str, dict[int, str]]] = {}
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: no client hands the features of DeepStack to a decoder"
    )

    def patch_indices(self, config: Any, patches: int, grid: Tensor) -> dict[str, Tensor]:
        """Also the four learned positions around each patch, and how much each counts."""
        found = super().patch_indices(config, patches, grid)
        image, (rows, columns) = found["cu_seqlens"], found["position_ids"].unbind(-1)
        side = int(config.num_position_embeddings**0.5)
        row_taps, row_weights = _taps(rows, grid[:, 1][image], side)
        column_taps, column_weights = _taps(columns, grid[:, 2][image], side)
        taps = row_taps.unsqueeze(2) * side + column_taps.unsqueeze(1)
        weights = row_weights.unsqueeze(2) * column_weights.unsqueeze(1)
        return {**found, "interp_indices": taps.flatten(1), "interp_weights": weights.flatten(1)}

    def encoder_outputs(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        found = self.tower(model, inputs)
        found.deepstack_features = [[features] for features in found.deepstack_features]
        found.pooler_output = [found.pooler_output]
        return {"image": found}

    def logits(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        with _traceable_deepstack(model):
            return super().logits(model, inputs)


class Qwen3VLMoe(Qwen3VL):
    """The same with routed experts in the decoder."""

    model_type: ClassVar[str] = "qwen3_vl_moe"


def _taps(place: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The two of `side` learned positions next to a place int64 [P], as int64 [P, 2], and their
    weights; the first and last of `size` places are the first and last learned ones."""
    source = place.to(torch.float32) * (side - 1) / (size - 1).clamp(min=1)
    low = source.floor()
    offsets = torch.arange(2, device=place.device)
    taps = (low.long().unsqueeze(1) + offsets).clamp(0, side - 1)
    distance = (source.unsqueeze(1) - low.unsqueeze(1) - offsets).abs()
    return taps, (1 - distance).clamp(min=0)


@contextmanager
def _traceable_deepstack(model: Any) -> Iterator[None]:
    """The model's own addition has as many rows as the mask says, which no trace can know."""

    def add(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        placed = torch.zeros_like(hidden).masked_scatter(mask.unsqueeze(-1), features)
        return hidden + placed

    model.model.language_model._deepstack_process = add
    try:
        yield
    finally:
        del model.model.language_model._deepstack_process
