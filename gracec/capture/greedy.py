"""Greedy generation over serving graphs, whatever runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    runtime: Runtime,
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    end: Sequence[int] = (),
    pad: int = 0,
    chunk: int | None = None,
    processors: Callable[..., Tensor] | None = None,
) -> Iterator[Step]:
    """Generate the most likely tokens, one position of all prompts at a time.

    Args:
        inputs: prepared, padded on the left.
        end: tokens that end an answer; `pad` follows it until all have ended.
        chunk: positions of the prompt to read at once; all by default.
        processors: all tokens [B, S] until here and the next logits [B, V] -> those to choose by;
            a `LogitsProcessorList` of transformers, for example.
    """
    embeds, mask = embed_prompt(runtime, inputs), inputs["attention_mask"]
    positions = _prompt_positions(runtime, inputs)
    length = embeds.shape[1]
    past, logits = None, embeds
    for start in range(0, length, chunk or length):
        part = slice(start, min(length, start + (chunk or length)))
        past_mask = mask[:, : part.stop]
        logits, past = runtime.decode(embeds[:, part], past_mask, positions[..., part], 1, past)
    finished = torch.zeros(len(mask), dtype=torch.bool)
    ends, seen = torch.tensor(list(end), dtype=torch.int64), inputs["input_ids"]
    for number in range(max_new_tokens):
        last = logits[:, -1]
        if processors is not None:
            last = processors(seen, last.clone())
        tokens = last.argmax(-1).masked_fill(finished, pad)
        yield Step(tokens, last)
        finished |= torch.isin(tokens, ends)
        if finished.all() or number + 1 == max_new_tokens:
            return
        seen = torch.cat([seen, tokens[:, None]], dim=1)
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
