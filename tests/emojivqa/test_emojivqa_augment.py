"""Restyled scenes look different and show the same."""

import torch
from emojivqa import augment
from emojivqa.models import pixels
from emojivqa.packing import arrays
from emojivqa.scenes import CELL

PICTURES = pixels(torch.from_numpy(arrays("train", range(12))["images"]))


def test_pixels_stay_in_range_and_change() -> None:
    torch.manual_seed(0)
    made = augment.restyle(PICTURES)
    assert made.shape == PICTURES.shape
    assert made.abs().max() <= 1.0
    assert (made - PICTURES).abs().mean() > 0.05


def test_every_cell_is_changed_on_its_own() -> None:
    torch.manual_seed(0)
    picture = PICTURES[:1].repeat(8, 1, 1, 1)
    changed = (augment.restyle(picture) - picture).abs()
    means = changed.unflatten(3, (2, CELL)).unflatten(2, (2, CELL)).mean((1, 3, 5))
    assert means.flatten().unique().numel() == means.numel()


def test_tiles_go_back_where_they_were() -> None:
    torch.testing.assert_close(augment._join(augment._split(PICTURES)), PICTURES)
    top_right = augment._split(PICTURES)[1]
    torch.testing.assert_close(top_right, PICTURES[0, :, :CELL, CELL:])


def test_lightness_survives_a_change_of_colour() -> None:
    torch.manual_seed(0)
    tiles = augment._split(PICTURES)
    made = augment._recolour(tiles)
    torch.testing.assert_close(made.mean(1), tiles.mean(1), atol=1e-5, rtol=1e-5)


def test_the_same_seed_draws_the_same() -> None:
    torch.manual_seed(3)
    first = augment.restyle(PICTURES)
    torch.manual_seed(3)
    torch.testing.assert_close(augment.restyle(PICTURES), first, atol=0, rtol=0)
