"""InternVL: pictures cut into square tiles of one size, each of a fixed number of tokens.

The tiles of all pictures come as one batch, and each counts as an image. How many a picture has is
the processor's affair: the graph takes any number.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.serving_graph import BATCH


class InternVL(Family):
    model_type: ClassVar[str] = "internvl"
    vision: ClassVar[Dims] = {"pixel_values": (0,)}
    serving: ClassVar[dict[str, dict[int, str]]] = {"pixel_values": {0: BATCH}}

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        features: Tensor = parts.get_image_features(inputs["pixel_values"]).pooler_output
        return features.reshape(-1, features.shape[-1])

    def encoder_outputs(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        features: Any = self.encode(model, inputs)
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        vision, ratio = model.config.vision_config, model.config.downsample_ratio
        sides = zip(vision.image_size, vision.patch_size, strict=True)
        height, width = (int(size // patch * ratio) for size, patch in sides)
        return [height * width] * len(batch["pixel_values"])
