"""Greedy generation over serving graphs, whatever runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

if TYPE_CHECKING:  # capture checks its graphs by running them, with what is here
    from gracec.capture.families.base import Family


class Runtime(Protocol):
    """What runs the serving graphs of a model. A cache is whatever it keeps one in."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def family(self) -> Family: ...

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Visual tokens [N, H] of images, from inputs of the vision encoder."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, S, H] of token ids [B, S]."""

    def decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        keep: int,
        past: Any = None,
    ) -> tuple[Tensor, Any]:
        """Logits [B, keep, V] (all S for 0) and the longer cache.

        Args:
            embeds: [B, S, H], the tokens after the cache.
            attention_mask: int64 [B, P + S].
            past: a cache that `decode` returned, or None for an empty one.
        """


class Step(NamedTuple):
    """One generated token of each prompt [B], and the logits [B, V] that it was chosen by."""

    tokens: Tensor
    logits: Tensor


def embed_prompt(runtime: Runtime, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embeddings [B, T, H] of prepared inputs, visual tokens in their places."""
    ids, family = inputs["input_ids"], runtime.family
    embeds = runtime.embed(ids)
    if not any(name in inputs for name in family.vision):  # a prompt without images
        return embeds
    return family.merge(runtime.config, ids, embeds, runtime.encode(family.vision_feed(inputs)))


def prompt_logits(
    runtime: Runtime,
    inputs: Mapping[str, Tensor],
    parts: Sequence[slice] = (slice(None),),
    positions: Tensor | None = None,
) -> Tensor:
    """Logits [B, T, V] of a whole prompt, read part by part."""
    embeds, mask = embed_prompt(runtime, inputs), inputs["attention_mask"]
    positions = _prompt_positions(runtime, inputs) if positions is None else positions
    past, found = None, []
    for part in parts:
        seen = mask[:, : part.stop]
        logits, past = runtime.decode(embeds[:, part], seen, positions[..., part], 0, past)
        found.append(logits)
    return torch.cat(found, dim=1)


def greedy(
    runtime: Runtime, inputs: Mapping[str, Tensor], *, max_new_tokens: int
) -> Iterator[Step]:
    """Generate the most likely tokens, one position of all prompts at a time; none ends an answer.

    It shares nothing with `generate` of transformers, whose answers are held to it.

    Args:
        inputs: prepared, padded on the left.
    """
    embeds, mask = embed_prompt(runtime, inputs), inputs["attention_mask"]
    positions = _prompt_positions(runtime, inputs)
    logits, past = runtime.decode(embeds, mask, positions, 1)
    for number in range(max_new_tokens):
        last = logits[:, -1]
        tokens = last.argmax(-1)
        yield Step(tokens, last)
        if number + 1 == max_new_tokens:
            return
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = next_positions(positions)
        logits, past = runtime.decode(runtime.embed(tokens[:, None]), mask, positions, 1, past)


def next_positions(positions: Tensor) -> Tensor:
    """Positions [..., B, 1] of one more token.

    Args:
        positions: int64 [B, T], or [3, B, T] where an image has rows and columns: the next token is
            beyond all of them.
    """
    highest = positions.amax(-1, keepdim=True)
    if positions.dim() == 3:
        highest = highest.amax(0, keepdim=True).expand_as(highest)
    return highest + 1


def _prompt_positions(runtime: Runtime, inputs: Mapping[str, Tensor]) -> Tensor:
    """Those that were prepared, or those of text."""
    found = inputs.get("position_ids")
    return runtime.family.positions(inputs["attention_mask"]) if found is None else found
