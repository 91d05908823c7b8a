"""What a runtime runs: a module for each graph, with the names and symbols of inputs and outputs.

    vision_encoder   pixels -> visual tokens
    embed_tokens     token ids -> embeddings
    decoder          embeddings and cache -> logits and longer cache

The host puts visual tokens in the place of their embeddings. One decoder graph reads a prompt
(empty cache), reads it in parts, and generates (one position at a time).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from gracec.models.cache_argument import CACHE_ARGUMENT
from gracec.quant.ops import last_positions

BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {LENGTH}"
KEPT = "num_logits"
CACHE, GROWN_CACHE = "past_key_values", "present"
VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder"

Shape: TypeAlias = tuple[str | int, ...]
"""Sizes; a string is a symbol or a sum of symbols."""


@dataclass(frozen=True)
class ServingGraph:
    """One graph to be captured.

    Attributes:
        module: holds the model as its only child, named `model`. Its arguments are the inputs; all
            inputs `name.*` together are one list, `name`.
        example: input name -> tensor, in order.
        inputs, outputs: name -> shape, in order. Outputs are held to it.
    """

    module: nn.Module
    example: Mapping[str, Tensor]
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]


class TokenEmbedding(nn.Module):
    """input_ids [B, S] -> inputs_embeds [B, S, H]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded


class DecoderStep(nn.Module):
    """Embeddings [B, S, H] after a cache of P positions -> logits [B, n, V] and the longer cache.

    `num_logits_to_keep` n: the last positions whose logits are computed, 0 for all. The cache is a
    list of keys and values [B, KV, P, HD], layer by layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        past_key_values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        model: Any = self.model
        outputs = model.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_ARGUMENT: _cache(past_key_values)},
        )
        kept = last_positions(outputs.last_hidden_state, num_logits_to_keep)
        logits: Tensor = model.lm_head(kept)
        layers = outputs[CACHE_ARGUMENT].layers
        return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def embedding_graph(model: PreTrainedModel) -> ServingGraph:
    """The embedding of tokens, placeholders of images among them."""
    hidden = model.config.get_text_config().hidden_size
    ids = torch.zeros((2, 3), dtype=torch.int64, device=model.device)
    shape: Shape = (BATCH, LENGTH)
    return ServingGraph(
        TokenEmbedding(model),
        {"input_ids": ids},
        {"input_ids": shape},
        {"inputs_embeds": (*shape, hidden)},
    )


def decoder_graph(model: PreTrainedModel, positions: Shape = (BATCH, LENGTH)) -> ServingGraph:
    """The decoder.

    Args:
        positions: shape of its position ids.
    """
    text = model.config.get_text_config()
    heads = text.num_key_value_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached: Shape = (BATCH, heads, PAST, head_size)
    grown: Shape = (BATCH, heads, TOTAL, head_size)
    inputs: dict[str, Shape] = {
        "inputs_embeds": (BATCH, LENGTH, text.hidden_size),
        "attention_mask": (BATCH, TOTAL),
        "position_ids": positions,
        "num_logits_to_keep": (),
        **dict.fromkeys(cache_names(CACHE, text.num_hidden_layers), cached),
    }
    outputs: dict[str, Shape] = {
        "logits": (BATCH, KEPT, text.vocab_size),
        **dict.fromkeys(cache_names(GROWN_CACHE, text.num_hidden_layers), grown),
    }
    sizes = {BATCH: 2, LENGTH: 5, PAST: 3, TOTAL: 8}
    dtypes = {"attention_mask": torch.int64, "position_ids": torch.int64}
    example = {
        name: torch.ones(
            [sizes[size] if isinstance(size, str) else size for size in shape],
            dtype=dtypes.get(name, model.dtype),
            device=model.device,
        )
        for name, shape in inputs.items()
    }
    example["num_logits_to_keep"] = torch.tensor(2)
    return ServingGraph(DecoderStep(model), example, inputs, outputs)


def decoder_inputs(
    embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, keep: int
) -> dict[str, Tensor]:
    """What a decoder takes beside its cache, by name.

    Args:
        embeds: [B, S, H], the tokens after the cache.
        attention_mask: int64 [B, P + S].
        position_ids: int64 [B, S]; of Qwen's families [3, B, S].
        keep: the last positions whose logits are computed, 0 for all.
    """
    return {
        "inputs_embeds": embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "num_logits_to_keep": torch.tensor(keep),
    }


def empty_cache(
    inputs: Mapping[str, Shape], batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """A cache of no positions for a decoder with these inputs."""
    sizes = {BATCH: batch, PAST: 0}
    return {
        name: torch.empty(
            [sizes[size] if isinstance(size, str) else size for size in shape],
            dtype=dtype,
            device=device,
        )
        for name, shape in inputs.items()
        if name.startswith(f"{CACHE}.")
    }


def cache_names(prefix: str, layers: int) -> Iterator[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, ..."""
    return (f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))


def _cache(past: Sequence[Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for key, value in zip(past[0::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device = key.dtype, key.device
        layer.keys, layer.values, layer.is_initialized = key, value, True
        cache.layers.append(layer)
    return cache
