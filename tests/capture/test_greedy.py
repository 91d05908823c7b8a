from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gracec.capture.families import families
from gracec.capture.greedy import Runtime, greedy, prompt_logits

VOCAB, IMAGE = 10, 9


class Counting:
    """Says the number after the last one; notes what it was asked."""

    config: Any = SimpleNamespace(image_token_id=IMAGE)
    family = families()["llava"]

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], list[list[int]], int, int]] = []

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.full((len(inputs["pixel_values"]), 1), 5.0)

    def embed(self, input_ids: Tensor) -> Tensor:
        return input_ids[..., None].float()

    def decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        keep: int,
        past: Any = None,
    ) -> tuple[Tensor, Any]:
        seen = 0 if past is None else past
        assert attention_mask.shape[1] == seen + embeds.shape[1]
        tokens = embeds[..., 0].long()
        self.calls.append((tokens.tolist(), position_ids.tolist(), keep, seen))
        logits = torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()
        return logits[:, -keep:], seen + embeds.shape[1]


def prompt(*rows: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def tokens_of(runtime: Runtime, *rows: list[int], **options: Any) -> list[list[int]]:
    steps = list(greedy(runtime, prompt(*rows), **options))
    assert all(torch.equal(step.logits.argmax(-1), step.tokens) for step in steps[:1])
    return torch.stack([step.tokens for step in steps], dim=1).tolist()


def test_one_position_at_a_time_after_the_prompt() -> None:
    runtime = Counting()
    assert tokens_of(runtime, [0, 1, 2], [4, 5, 6], max_new_tokens=3) == [[3, 4, 5], [7, 8, 9]]
    assert runtime.calls == [
        ([[0, 1, 2], [4, 5, 6]], [[0, 0, 1], [0, 1, 2]], 1, 0),
        ([[3], [7]], [[2], [3]], 1, 3),
        ([[4], [8]], [[3], [4]], 1, 4),
    ]


def test_visual_tokens_take_the_places_of_their_placeholders() -> None:
    runtime = Counting()
    inputs = {**prompt([1, IMAGE, IMAGE, 2]), "pixel_values": torch.zeros(2, 1)}
    logits = prompt_logits(runtime, inputs, (slice(0, 2), slice(2, 4)))
    assert logits.argmax(-1).tolist() == [[2, 6, 6, 3]]
    assert [call[0] for call in runtime.calls] == [[[1, 5]], [[5, 2]]]
