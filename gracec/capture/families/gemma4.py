"""Gemma 4: patches of images of any size, padded to the same number and pooled to tokens; a decoder
with an embedding for each block, blocks that share keys and values, and sliding windows.

Where the configuration says so, tokens of an image see each other both ways within a window. The
audio tower takes no part.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.families.gemma3 import attention_masks
from gracec.errors import GracecError

PLACES, TOKENS = "image_position_ids", "token_indices"
AUDIO = "input_features"


class Gemma4(Family):
    """`pixel_values` are [I, P, 3 * S * S], patches whose column and row are `PLACES` [I, P, 2],
    -1 for padding. `TOKENS` [N] says which of the pooled patches [I * P / K / K] are tokens."""

    model_type: ClassVar[str] = "gemma4"
    vision: ClassVar[Dims] = {"pixel_values": (0, 1), PLACES: (0, 1), TOKENS: (0,)}
    computed: ClassVar[tuple[str, ...]] = ("mm_token_type_ids",)
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: each block has an embedding of the tokens, and some share keys and "
        "values, which the decoder graph has no inputs for"
    )

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        parts: Any = model.model
        tower, places = parts.vision_tower, inputs[PLACES]
        padding = (places == -1).all(dim=-1)
        hidden = tower.encoder(
            inputs_embeds=tower.patch_embedder(inputs["pixel_values"], places, padding),
            attention_mask=~padding,
            pixel_position_ids=places,
        ).last_hidden_state
        pooled = _pooled(hidden, places, padding, tower.config.pooling_kernel_size)
        pooled = pooled.float() * tower.pooler.root_hidden_size
        tokens = pooled.flatten(0, 1)[inputs[TOKENS]]
        if tower.config.standardize:
            tokens = (tokens - tower.std_bias.float()) * tower.std_scale.float()
        features: Tensor = parts.embed_vision(inputs_embeds=tokens.to(hidden.dtype))
        return features

    def text_arguments(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        """Tokens of an image see each other in sliding windows alone, unlike those of Gemma 3."""
        known = inputs["attention_mask"]
        visual = self.image_mask(model, inputs)
        none = torch.zeros_like(visual)
        both_ways = model.config.get_text_config().use_bidirectional_attention == "vision"
        full = "full_attention", attention_masks(model, known, none)["full_attention"]
        near = attention_masks(model, known, visual if both_ways else none)["sliding_attention"]
        masks = dict([full, ("sliding_attention", near)])
        return {"input_ids": inputs["input_ids"], "attention_mask": masks}

    def read(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        if batch.get(AUDIO) is not None:
            raise GracecError(
                "audio is not captured: the graph takes images only", where=f"batch, {AUDIO}"
            )
        return super().read(model, batch)

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        places = self.required(batch, PLACES)
        length = places.shape[1] // model.config.vision_config.pooling_kernel_size**2
        counts = self.image_tokens(model, batch)
        tokens = [torch.arange(count) + image * length for image, count in enumerate(counts)]
        return {
            "pixel_values": batch["pixel_values"],
            PLACES: places,
            TOKENS: torch.cat(tokens).to(places.device),
        }

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        real = (self.required(batch, PLACES) != -1).all(dim=-1).sum(dim=-1)
        counts: list[int] = (real // model.config.vision_config.pooling_kernel_size**2).tolist()
        return counts

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        places, pixels = self.required(batch, PLACES), batch["pixel_values"]
        if pixels.dim() != 3 or pixels.shape[:2] != places.shape[:2]:
            raise GracecError(
                f"pixel_values are {tuple(pixels.shape)} and {PLACES} {tuple(places.shape)}: the "
                "tower takes [images, patches, values] and the place of each patch",
                where="pixel_values",
                fix="use the model's own processor",
            )

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        config = model.config.vision_config
        side = config.pooling_kernel_size
        shapes = [(2, 2), (3, 2), (1, 4)]  # of tokens
        places = torch.full((images, 6 * side**2, 2), -1)
        for image, (columns, rows) in enumerate((shapes * images)[:images]):
            found = torch.cartesian_prod(torch.arange(rows * side), torch.arange(columns * side))
            places[image, : len(found)] = found.flip(1)
        shape = (*places.shape[:2], 3 * config.patch_size**2)
        real = (places != -1).all(dim=-1, keepdim=True)
        return {"pixel_values": torch.randn(shape, generator=generator) * real, PLACES: places}

    def example_text(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        return {"mm_token_type_ids": self.image_mask(model, batch).int()}


def _pooled(hidden: Tensor, places: Tensor, padding: Tensor, side: int) -> Tensor:
    """The mean [I, P / K / K, H] of each K x K patches of an image [I, P, H].

    By a multiplication, as in the model, whose own function finds K in the sizes of its tensors.
    """
    hidden = hidden.masked_fill(padding.unsqueeze(-1), 0.0)
    if side == 1:
        return hidden
    known = places.clamp(min=0)
    columns = known[..., 0].amax(dim=-1, keepdim=True) + 1
    token = known // side
    token = token[..., 0] + columns // side * token[..., 1]
    share = torch.arange(hidden.shape[1] // side**2, device=hidden.device)
    weights = (token.unsqueeze(-1) == share).float() / side**2
    return (weights.transpose(1, 2) @ hidden.float()).to(hidden.dtype)
