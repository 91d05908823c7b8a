"""A grown decoder answers as the one that it was grown from, and is free to become better."""

import pytest
import torch
from emojivqa import losses
from emojivqa.grow import widen_decoder, widen_visual
from emojivqa.models import SIZES, build, pixels
from emojivqa.packing import arrays, layout, questions_of

WIDTH = SIZES["teacher"]["width"]


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    narrow, wide = build("student").eval(), build("teacher").eval()
    widen_decoder(narrow, wide)
    return narrow, wide


@torch.no_grad()
def test_same_logits_and_same_reading_of_the_image(pair) -> None:
    narrow, wide = pair
    data = arrays("validation", range(2))
    form = layout(questions_of("validation", 0))
    tokens, cells = (torch.from_numpy(data[field]).long() for field in ("tokens", "cells"))
    visual = losses.visual_tokens(narrow, pixels(torch.from_numpy(data["images"])))
    seen = widen_visual(visual, WIDTH)
    expected = losses.answer_logits(narrow, visual, tokens, form)
    torch.testing.assert_close(
        losses.answer_logits(wide, seen, tokens, form), expected, atol=1e-3, rtol=1e-3
    )
    read = [
        losses.alignment(tokens, model.get_input_embeddings().weight, cells)[0]
        for model, tokens in ((narrow, visual), (wide, seen))
    ]
    torch.testing.assert_close(read[0], read[1])


def test_no_two_copies_are_read_alike(pair) -> None:
    """Otherwise they would get the same gradients, and stay copies for ever."""
    for name, weight in pair[1].model.language_model.named_parameters():
        if name.endswith("proj.weight"):
            half = weight.shape[1] // 2
            different = (weight[:, :half] - weight[:, half:]).abs().mean()
            assert different > 0.1 * weight.abs().mean()


def test_word_vectors_keep_their_length(pair) -> None:
    """The image side is aligned to them."""
    narrow, wide = (model.get_input_embeddings().weight.norm(dim=1) for model in pair)
    torch.testing.assert_close(narrow, wide)
