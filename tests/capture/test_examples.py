"""Example prompts: shape, padding, and that words are words."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedConfig

from gracec.capture.families.examples import example_prompts
from tests.tiny import IMAGE, PAD, tiny_config


def config() -> PreTrainedConfig:
    return tiny_config(vocab_size=IMAGE + 3)  # so few words that the image token is drawn often


@pytest.mark.parametrize(
    ("sizes", "batch", "shares"),
    [([3], 1, [3]), ([3, 2, 4], 2, [5, 4]), ([2, 2], 3, [2, 2, 0])],
)
def test_images_are_shared_out_in_order(sizes: list[int], batch: int, shares: list[int]) -> None:
    found = example_prompts(config(), sizes, torch.Generator(), batch=batch, text=9)
    ids, mask = found["input_ids"], found["attention_mask"]
    assert (ids == IMAGE).sum(1).tolist() == shares
    text = [9 - row for row in range(batch)]
    assert mask.sum(1).tolist() == [a + b for a, b in zip(text, shares, strict=True)]
    for row, known in zip(ids, mask.bool(), strict=True):
        length = int(known.sum())
        assert known[-length:].all() and (row[: len(row) - length] == PAD).all()


def test_images_are_kept_apart() -> None:
    found = example_prompts(config(), [2, 2, 2], torch.Generator(), batch=1, text=1)
    visual = (found["input_ids"][0] == IMAGE).int().tolist()
    assert visual == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0]


def test_the_same_generator_gives_the_same_words() -> None:
    one, same = (
        example_prompts(config(), [2], torch.Generator().manual_seed(3), batch=2, text=20)
        for _ in range(2)
    )
    assert torch.equal(one["input_ids"], same["input_ids"])
