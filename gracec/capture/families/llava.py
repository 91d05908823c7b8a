"""LLaVA: a CLIP-like tower, an MLP projector, image features scattered over placeholder tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.families.pixtral import Pixtral
from gracec.capture.serving_graph import BATCH
from gracec.errors import GracecError

PIXTRAL = "pixtral"
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Model type of a tower that takes images of one size -> tokens before those of the patches."""


class Llava(Family):
    model_type: ClassVar[str] = "llava"
    vision: ClassVar[Dims] = {"pixel_values": (0,)}
    serving: ClassVar[dict[str, dict[int, str]]] = {"pixel_values": {0: BATCH}}

    def of(self, config: PreTrainedConfig) -> Family:
        pixtral = config.vision_config.model_type == PIXTRAL
        return LlavaPixtral.instance() if pixtral else self

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

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        _class_tokens(model)
        return super().example_images(model, images, generator)

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        vision = model.config.vision_config
        tokens = int((vision.image_size // vision.patch_size) ** 2) + _class_tokens(model)
        # What is dropped is the first token, whether or not it is that of the class.
        tokens -= model.config.vision_feature_select_strategy == "default"
        return [tokens] * len(batch["pixel_values"])


class LlavaPixtral(Pixtral, Llava):
    """LLaVA with the tower of Pixtral, which takes images of any size."""

    def project(self, model: PreTrainedModel, hidden: Tensor, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        features: Tensor = parts.multi_modal_projector(hidden)
        return features


def _class_tokens(model: PreTrainedModel) -> int:
    """How many tokens a tower has before those of the patches.

    Raises:
        GracecError: if it is not known.
    """
    tower = model.config.vision_config.model_type
    if tower not in CLASS_TOKENS:
        known = ", ".join(sorted({*CLASS_TOKENS, PIXTRAL}))
        raise GracecError(
            f"the tower is a {tower!r}, which is not known here; {known} are captured",
            where=type(model).__name__,
            fix="write an adapter, one file in gracec/capture/families",
        )
    return CLASS_TOKENS[tower]
