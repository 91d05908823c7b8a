"""Image tokens against images: what fits, and where it does not."""

from __future__ import annotations

import pytest
import torch

from gracec.capture.families.check import check_image_tokens
from gracec.errors import GracecError


def visual(*counts: int) -> torch.Tensor:
    """bool [B, 9] with so many placeholders a row."""
    return torch.arange(9) < torch.tensor(counts).unsqueeze(1)


@pytest.mark.parametrize("counts", [(5, 4), (3, 6), (9, 0), (0, 9)])
def test_prompts_with_whole_images(counts: tuple[int, ...]) -> None:
    check_image_tokens(visual(*counts), [3, 2, 4])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            (4, 5),
            "^sample 0 of the batch: the prompt holds 4 .*: 3, 2, 4 tokens each .was it trunc",
        ),
        ((5, 3), "^sample 1 of the batch: the prompt holds 3 image tokens"),
        ((9, 2), "^batch: the prompts have places for 11 visual tokens, the 3 images .* have 9"),
        ((3, 2), "^batch: the prompts have places for 5 visual tokens, the 3 images .* have 9"),
    ],
)
def test_prompts_that_do_not_fit_their_images(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(GracecError, match=message):
        check_image_tokens(visual(*counts), [3, 2, 4])


def test_many_sizes_are_cut_short() -> None:
    with pytest.raises(GracecError, match=r": 1, 2, 3, \.\.\. tokens each"):
        check_image_tokens(visual(2), [1, 2, 3, 4, 1])
