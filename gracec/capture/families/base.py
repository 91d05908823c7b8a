"""What the compiler needs to know about a model family, and nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gracec.capture.serving_graph import ServingGraph
from gracec.errors import GracecError


class Family(ABC):
    """Adapter of one model family.

    `prepare` runs on the host: everything that depends on data is computed there and becomes an
    input of the graph. The module of `traced` is what `torch.export` sees: encode the images, then
    the Hugging Face forward, with a flat, explicit signature whose names equal the keys of
    `prepare` and of `dynamic_shapes`.
    """

    model_type: ClassVar[str]

    @abstractmethod
    def prepare(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The graph's inputs, in order, from what the processor returned.

        Raises:
            GracecError: if an input is missing or image tokens and image features disagree.
        """

    @abstractmethod
    def image_index(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[int]]:
        """Which image each token belongs to, from what `prepare` returned.

        Returns:
            int64 [B, T], the number of the image in the batch or -1 for text, and the number of
            tokens of each image.
        """

    @abstractmethod
    def traced(self, model: PreTrainedModel) -> nn.Module:
        """The module to export; it holds the model as its only child, named `model`."""

    @abstractmethod
    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Dynamic dimensions of each input."""

    @abstractmethod
    def example_batch(
        self, model: PreTrainedModel, *, batch: int = 2, images: int = 3, text: int = 7
    ) -> dict[str, Tensor]:
        """A left-padded batch built from the config alone.

        Args:
            batch: prompts; the images are shared out among them, the first ones getting one more.
            images: images in the whole batch.
            text: text tokens of the longest prompt; each further prompt has one fewer.
        """

    def serving_graphs(self, model: PreTrainedModel) -> dict[str, ServingGraph]:
        """The graphs for a runtime: `vision_encoder`, `embed_tokens`, `decoder`.

        The inputs of `vision_encoder` are some of those that `prepare` returns.

        Raises:
            GracecError: if there are none for this family.
        """
        raise GracecError("has no serving graphs yet", where=f"family {self.model_type}")

    def merge(
        self, config: PreTrainedConfig, input_ids: Tensor, embeds: Tensor, features: Tensor
    ) -> Tensor:
        """Embeddings [B, T, H] with visual tokens [N, H] in the place of their placeholders."""
        merged = embeds.clone()
        merged[input_ids == config.image_token_id] = features.to(embeds.dtype)
        return merged

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Positions int64 [B, T] of all tokens so far; padding on the left has position 0."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
