"""LLaVA: a CLIP-like tower, an MLP projector, image features scattered over placeholder tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gracec.capture.families.base import Family
from gracec.capture.serving_graph import (
    BATCH,
    DECODER,
    EMBEDDING,
    VISION,
    ServingGraph,
    decoder_graph,
    embedding_graph,
)
from gracec.errors import GracecError


class LlavaTraced(nn.Module):
    """(input_ids [B, T], attention_mask [B, T], pixel_values [I, 3, H, W]) -> logits [B, T, V]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        features: Any = [encode(self.model, pixel_values)]
        logits: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
            use_cache=False,
        ).logits
        return logits


class VisionEncoder(nn.Module):
    """pixel_values [I, 3, H, W] -> image_features [I * tokens, hidden]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return encode(self.model, pixel_values)


def encode(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """pixel_values [I, 3, H, W] -> projected visual tokens [I * tokens, hidden].

    Not the model's own `get_image_features`: that one splits the batch into a Python list of
    images, which fixes the number of images in the graph.
    """
    config = model.config
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True)
    layers = config.vision_feature_layer
    chosen = [outputs.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":  # without the class token
        chosen = [hidden[:, 1:] for hidden in chosen]
    # No `cat` of one layer: it would copy the slice, and bfloat16 kernels round by memory layout.
    selected = chosen[0] if isinstance(layers, int) else torch.cat(chosen, dim=-1)
    features: Tensor = model.model.multi_modal_projector(selected)
    return features.reshape(-1, features.shape[-1])


class Llava(Family):
    model_type: ClassVar[str] = "llava"

    def prepare(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name in ("input_ids", "pixel_values"):
            if batch.get(name) is None:
                raise GracecError(f"{name} is missing", where="batch", fix="use the processor")
        input_ids, pixel_values = batch["input_ids"], batch["pixel_values"]
        attention_mask = batch.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_image_tokens(model, input_ids, pixel_values)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values.to(model.dtype),
        }

    def image_index(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[int]]:
        ids, tokens = inputs["input_ids"], self.image_tokens(model)
        visual = ids == model.config.image_token_id
        number = (visual.flatten().cumsum(0) - 1).view_as(ids) // tokens
        return number.masked_fill(~visual, -1), [tokens] * len(inputs["pixel_values"])

    def traced(self, model: PreTrainedModel) -> nn.Module:
        return LlavaTraced(model)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        return {
            "input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
            "attention_mask": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
            "pixel_values": {0: Dim.DYNAMIC},
        }

    def example_batch(
        self, model: PreTrainedModel, *, batch: int = 2, images: int = 3, text: int = 7
    ) -> dict[str, Tensor]:
        config = model.config
        tokens = self.image_tokens(model)
        pad = config.text_config.pad_token_id
        pad = 0 if pad is None or pad < 0 else pad
        vocab = config.text_config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = []
        for number in range(batch):
            share = images // batch + (number < images % batch)
            words = torch.randint(0, vocab, (max(2, text - number),), generator=generator)
            words[words == config.image_token_id] = (config.image_token_id + 1) % vocab
            picture = torch.full((share * tokens,), config.image_token_id)
            prompts.append(torch.cat([words[:1], picture, words[1:]]))
        longest = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((batch, longest), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = prompt
            attention_mask[row, longest - len(prompt) :] = 1
        size = config.vision_config.image_size
        channels = getattr(config.vision_config, "num_channels", 3)
        pixels = torch.randn((images, channels, size, size), generator=generator)
        device = model.device
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "pixel_values": pixels.to(device, model.dtype),
        }

    def serving_graphs(self, model: PreTrainedModel) -> dict[str, ServingGraph]:
        pixels = self.example_batch(model, batch=2, images=2)["pixel_values"]
        hidden = model.config.get_text_config().hidden_size
        vision = ServingGraph(
            VisionEncoder(model),
            {"pixel_values": pixels},
            {"pixel_values": (BATCH, *pixels.shape[1:])},
            {"image_features": ("num_image_tokens", hidden)},
        )
        return {
            VISION: vision,
            EMBEDDING: embedding_graph(model),
            DECODER: decoder_graph(model),
        }

    @staticmethod
    def image_tokens(model: PreTrainedModel) -> int:
        """Visual tokens of one image of the configured size."""
        vision = model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        keeps_class = model.config.vision_feature_select_strategy != "default"
        return int(tokens) + int(keeps_class)

    def _check_image_tokens(
        self, model: PreTrainedModel, input_ids: Tensor, pixel_values: Tensor
    ) -> None:
        """The traced graph no longer checks this, so every batch is checked here."""
        tokens = self.image_tokens(model)
        size = model.config.vision_config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise GracecError(
                f"images are {tuple(pixel_values.shape[-2:])} pixels, the tower takes {size}",
                where="pixel_values",
                fix="use the model's own processor",
            )
        per_prompt = (input_ids == model.config.image_token_id).sum(1)
        cut = torch.nonzero(per_prompt % tokens).flatten().tolist()
        if cut:
            raise GracecError(
                f"the prompt holds {int(per_prompt[cut[0]])} image tokens, a multiple of {tokens} "
                "is needed (was it truncated inside an image?)",
                where=f"sample {cut[0]} of the batch",
                fix="allow longer prompts or drop the sample",
            )
        found = int(per_prompt.sum()) // tokens
        if found != len(pixel_values):
            raise GracecError(
                f"the prompts have places for {found} images, {len(pixel_values)} were given",
                where="batch",
                fix="put one image placeholder into the prompt for each image",
            )
