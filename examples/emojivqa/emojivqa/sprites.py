"""Emoji artwork: one webp atlas per style, and which styles each split may draw from."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from .concepts import CONCEPTS

FOLDER = Path(__file__).resolve().parent.parent / "sprites"
TILE = 40
STYLES = {
    "train": ("noto", "noto-v1", "fluent-flat", "fluent-3d", "emojione"),
    "validation": ("fxemoji",),
    "test": ("twemoji",),
}


@cache
def load(style: str) -> np.ndarray:
    """The sprites of one style, uint8 [concept, TILE, TILE, RGBA], black where clear."""
    with Image.open(FOLDER / f"{style}.webp") as image:
        atlas = np.asarray(image.convert("RGBA"))
    rows, columns = atlas.shape[0] // TILE, atlas.shape[1] // TILE
    tiles = atlas.reshape(rows, TILE, columns, TILE, 4).swapaxes(1, 2).reshape(-1, TILE, TILE, 4)
    tiles = tiles[: len(CONCEPTS)].copy()
    tiles[tiles[..., 3] == 0] = 0
    return tiles
