"""GLM-4V: Qwen2-VL with learned positions in the tower, interpolated to the grid of each image."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.capture.families.base import Inputs
from gracec.capture.families.qwen2_vl import GRID, Qwen2VL


class Glm4V(Qwen2VL):
    model_type: ClassVar[str] = "glm4v"
    serving_names: ClassVar[dict[str, str]] = {}
    serving_config: ClassVar[tuple[str, ...]] = ()

    def tower(self, model: PreTrainedModel, inputs: Inputs) -> Any:
        """The embeddings would take the sizes of images from the argument that here says how long
        each segment is; they get them from the grid."""
        sizes = inputs[GRID].prod(-1)

        def sized(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, _, *rest = arguments
            return (hidden, sizes, *rest)

        parts: Any = model.model
        hook = parts.visual.embeddings.register_forward_pre_hook(sized)
        try:
            return super().tower(model, inputs)
        finally:
            hook.remove()
