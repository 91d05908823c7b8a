"""Prompts with images from a configuration alone: what a model is traced and checked with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def example_prompts(
    config: PreTrainedConfig,
    image_tokens: Sequence[int],
    generator: torch.Generator,
    *,
    batch: int,
    text: int,
) -> dict[str, Tensor]:
    """Left-padded prompts of random words around the placeholders of images.

    Args:
        image_tokens: placeholders of each image; the images are shared out among the prompts, the
            first ones getting one more.
        batch: prompts, B.
        text: text tokens of the longest prompt; each further prompt has one fewer, but enough to
            keep its images apart.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, T].
    """
    decoder = config.get_text_config()
    sizes, images = list(image_tokens), len(image_tokens)
    pad = decoder.pad_token_id
    pad = 0 if pad is None or pad < 0 else pad
    prompts = []
    for number in range(batch):
        share = images // batch + (number < images % batch)
        length = max(share + 1, text - number)
        words = torch.randint(0, decoder.vocab_size, (length,), generator=generator)
        words[torch.isin(words, _reserved(config))] = _free(config)
        parts = []
        for place in range(share):
            picture = torch.full((sizes.pop(0),), config.image_token_id)
            parts += [words[place : place + 1], picture]
        prompts.append(torch.cat([*parts, words[share:]]))
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((batch, longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        attention_mask[row, longest - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _reserved(config: PreTrainedConfig) -> Tensor:
    """Ids that stand for something that is not text."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    found = [getattr(config, name, None) for name in names]
    return torch.tensor([number for number in found if number is not None])


def _free(config: PreTrainedConfig) -> int:
    """An id that is no reserved one, after that of images if possible."""
    vocab: int = config.get_text_config().vocab_size
    image: int = config.image_token_id
    reserved = set(_reserved(config).tolist())
    candidates = ((image + step) % vocab for step in range(1, vocab))
    return next(number for number in candidates if number not in reserved)
