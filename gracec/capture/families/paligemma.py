"""PaliGemma: images of one size before a prompt that is read both ways, and a causal answer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Family, Inputs
from gracec.capture.families.gemma3 import Gemma3
from gracec.objective.labels import IGNORE_INDEX


class PaliGemma(Gemma3):
    model_type: ClassVar[str] = "paligemma"
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: a prompt is read both ways, and the decoder graph is causal"
    )

    def text_arguments(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        return Family.text_arguments(self, model, inputs)

    def token_types(self, model: PreTrainedModel, batch: Inputs) -> Tensor:
        """int64 [B, T]: 0 for the prompt, 1 for the answer, which starts with the first label."""
        ids, labels = batch["input_ids"], batch.get("labels")
        found = batch.get("token_type_ids")
        found = torch.zeros_like(ids) if found is None else found
        if labels is not None:
            found = found | ((labels != IGNORE_INDEX).cumsum(1) > 0)
        return found.long()

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        vision = model.config.vision_config
        return [int(vision.image_size // vision.patch_size) ** 2] * len(batch["pixel_values"])
