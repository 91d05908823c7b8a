"""Mistral 3: the tower of Pixtral, and a projector that merges patches next to each other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Inputs
from gracec.capture.families.pixtral import PLACES, SIZES, Pixtral, patch_size

MERGED = "merge_indices"


class Mistral3(Pixtral):
    """Token n is made of the patches `MERGED` [N, M], those of a square row by row."""

    model_type: ClassVar[str] = "mistral3"
    vision: ClassVar[Dims] = {**Pixtral.vision, MERGED: (0,)}
    serving: ClassVar[dict[str, dict[int, str]]] = {
        **Pixtral.serving,
        MERGED: {0: "num_image_tokens"},
    }

    def project(self, model: PreTrainedModel, hidden: Tensor, inputs: Inputs) -> Tensor:
        projector: Any = model.model.multi_modal_projector
        squares = projector.norm(hidden)[inputs[MERGED]]  # [N, M, C]
        merged = projector.patch_merger.merging_layer(squares.transpose(1, 2).flatten(1))
        features: Tensor = projector.linear_2(projector.act(projector.linear_1(merged)))
        return features

    def merged(self, model: PreTrainedModel) -> int:
        return int(model.config.spatial_merge_size)

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        found, merge = super().vision_inputs(model, batch), self.merged(model)
        start, squares = 0, []
        for height, width in (batch[SIZES] // patch_size(model)).tolist():
            places = torch.arange(height * width).view(height, width) + start
            square = places.unfold(0, merge, merge).unfold(1, merge, merge)
            squares.append(square.reshape(-1, merge**2))
            start += height * width
        return {**found, MERGED: torch.cat(squares).to(found[PLACES].device)}
