"""LLaVA: a CLIP-like tower, an MLP projector, image features scattered over placeholder tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.serving_graph import BATCH


class Llava(Family):
    model_type: ClassVar[str] = "llava"
    vision: ClassVar[Dims] = {"pixel_values": (0,)}
    serving: ClassVar[dict[str, dict[int, str]]] = {"pixel_values": {0: BATCH}}

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        """Not the model's own `get_image_features`: that one splits the batch into a Python list of
        images, which fixes the number of images in the graph."""
        parts: Any = model.model
        config = model.config
        outputs = parts.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        layers = config.vision_feature_layer
        one = isinstance(layers, int)
        chosen = [outputs.hidden_states[i] for i in ([layers] if one else layers)]
        if config.vision_feature_select_strategy == "default":  # without the class token
            chosen = [hidden[:, 1:] for hidden in chosen]
        # No `cat` of one layer: it would copy the slice, and bfloat16 kernels round by layout.
        features: Tensor = parts.multi_modal_projector(chosen[0] if one else torch.cat(chosen, -1))
        return features.reshape(-1, features.shape[-1])

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        vision = model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        keeps_class = model.config.vision_feature_select_strategy != "default"
        return [int(tokens) + int(keeps_class)] * len(batch["pixel_values"])
