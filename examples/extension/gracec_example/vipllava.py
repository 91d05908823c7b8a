"""ViP-LLaVA: LLaVA whose projector sees several layers of the tower, side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gracec.capture.families.base import Inputs
from gracec.capture.families.llava import Llava


class VipLlava(Llava):
    model_type: ClassVar[str] = "vipllava"

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        outputs = parts.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        layers = model.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        seen = torch.cat([outputs.hidden_states[layer][:, 1:] for layer in layers], -1)
        features: Tensor = parts.multi_modal_projector(seen)
        return features.reshape(-1, features.shape[-1])

    def encoder_outputs(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        """One tensor, where the forward of LLaVA takes a list."""
        features: Any = self.encode(model, inputs)
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        vision = model.config.vision_config
        return [(vision.image_size // vision.patch_size) ** 2] * len(batch["pixel_values"])
