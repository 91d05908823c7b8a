"""Any other vision-language model: its own forward, traced whole.

It works where no size depends on data: images of one size, each of as many tokens, and no inputs
but ids and pixels. Whether it does is decided by the trace and by the gate on it.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.errors import GracecError, first_line


class Generic(Family):
    """`pixel_values` are [I, 3, H, W] of the configured size."""

    model_type: ClassVar[str] = ""
    vision: ClassVar[Dims] = {"pixel_values": (0,)}
    serving_refusal: ClassVar[str] = "has no serving graphs: the family has no adapter of its own"

    def __init__(self) -> None:
        self._tokens: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        found: Any = model
        features = found.get_image_features(inputs["pixel_values"])
        features = getattr(features, "pooler_output", features)
        if not isinstance(features, Tensor):
            features = torch.cat(list(features))
        flat: Tensor = features.reshape(-1, features.shape[-1])
        return flat

    def logits(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        found: Any = model(**inputs, use_cache=False)
        logits: Tensor = found.logits
        return logits

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        """As many as the model makes of one image, which is asked once."""
        if model not in self._tokens:
            pixels = super().example_images(model, 1, torch.Generator())["pixel_values"]
            try:
                with torch.no_grad():
                    found = self.encode(
                        model, {"pixel_values": pixels.to(model.device, model.dtype)}
                    )
            except Exception as error:
                reason = first_line(error)
                raise self.refusal(model, f"it encodes no image by itself ({reason})") from error
            self._tokens[model] = len(found)
        return [self._tokens[model]] * len(batch["pixel_values"])

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        if getattr(model.config, "image_token_id", None) is None:
            raise self.refusal(model, "its configuration names no image token")
        taken = inspect.signature(type(model).forward).parameters
        known = {*self.text, *self.vision, "labels"}
        more = [name for name in batch if name in taken and name not in known]
        if more:
            raise self.refusal(model, f"it takes {', '.join(more)} beside ids and pixels")
        super().check(model, batch)

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if getattr(model.config, "image_token_id", None) is None:
            raise self.refusal(model, "its configuration names no image token")
        try:
            return super().example_images(model, images, generator)
        except GracecError as error:
            raise self.refusal(model, error.what) from None

    @staticmethod
    def refusal(model: PreTrainedModel, reason: str) -> GracecError:
        """Why a model cannot be captured without an adapter of its own."""
        return GracecError(
            f"the family {model.config.model_type!r} has no adapter, and without one the model "
            f"cannot be captured: {reason}",
            where=type(model).__name__,
            fix="write an adapter, one file in gracec/capture/families",
        )
