"""Gemma 3: images of one size, pooled to a few tokens, which see each other both ways."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gracec.capture.families.base import Dims, Family, Inputs


class Gemma3(Family):
    model_type: ClassVar[str] = "gemma3"
    text: ClassVar[Dims] = {**Family.text, "token_type_ids": (0, 1)}
    vision: ClassVar[Dims] = {"pixel_values": (0,)}
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: tokens of an image see each other both ways, and the decoder graph "
        "is causal"
    )

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        hidden = parts.vision_tower(pixel_values=inputs["pixel_values"]).last_hidden_state
        features: Tensor = parts.multi_modal_projector(hidden)
        return features.reshape(-1, features.shape[-1])

    def encoder_outputs(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        features: Any = self.encode(model, inputs)
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def text_arguments(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        masks = attention_masks(model, inputs["attention_mask"], inputs["token_type_ids"] == 1)
        return {"input_ids": inputs["input_ids"], "attention_mask": masks}

    def text_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        found = super().text_inputs(model, batch)
        return {**found, "token_type_ids": self.token_types(model, batch)}

    def token_types(self, model: PreTrainedModel, batch: Inputs) -> Tensor:
        """int64 [B, T]: 1 for tokens of images."""
        return self.image_mask(model, batch).long()

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        return [int(model.config.mm_tokens_per_image)] * len(batch["pixel_values"])

    def example_text(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        return {"token_type_ids": self.token_types(model, batch)}


def attention_masks(model: PreTrainedModel, known: Tensor, visual: Tensor) -> dict[str, Tensor]:
    """Which tokens see which, bool [B, 1, T, T], for the two kinds of layers.

    The model's own masks are made by `vmap`, which leaves its traces in a graph.

    Args:
        known: int64 [B, T], 0 for padding.
        visual: bool [B, T]; neighbours belong to one image.
    """
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    image = (visual & ~before).cumsum(1).masked_fill(~visual, 0)
    place = torch.arange(visual.shape[1], device=visual.device)
    query, key = place.unsqueeze(1), place.unsqueeze(0)
    together = (image.unsqueeze(2) == image.unsqueeze(1)) & (image.unsqueeze(2) > 0)
    full = ((key <= query) | together) & known.bool().unsqueeze(1)
    near = key > query - model.config.get_text_config().sliding_window
    masks = {"full_attention": full, "sliding_attention": full & near}
    return {name: mask.unsqueeze(1) for name, mask in masks.items()}
