"""eager: plain PyTorch, on whatever device it runs, where a machine has no INT4 kernels.

A weight is codes times scales while its layer runs, so the model takes the memory of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gracec.capture import family_of
from gracec.frozen import Frozen, dense_twin
from gracec.journal import Note
from gracec.targets import Target


@dataclass(frozen=True)
class EagerModel:
    """A Hugging Face model that takes what the processor returns."""

    model: PreTrainedModel

    @property
    def config(self) -> PreTrainedConfig:
        found: PreTrainedConfig = self.model.config
        return found

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __call__(self, **inputs: Tensor) -> Any:
        model: Any = self.model
        with torch.no_grad():
            return model(**family_of(model).model_inputs(model, inputs), use_cache=False)

    def generate(self, **inputs: Any) -> Tensor:
        model: Any = self.model
        tokens: Tensor = model.generate(**family_of(model).model_inputs(model, inputs))
        return tokens


class Eager(Target):
    name: ClassVar[str] = "eager"

    def lower(self, frozen: Frozen, *, strict: bool = False) -> tuple[EagerModel, Sequence[Note]]:
        model = dense_twin(frozen, frozen.dtype)
        return EagerModel(model), [Note(self.name, "weights are made from codes as layers run")]

    def summary(self, frozen: Frozen) -> str:
        return f"all {len(frozen.weights)} weights as floats, by plain PyTorch"
