"""Scenes: one to four emoji on a 2 x 2 grid, 64 x 64 pixels, from a split's name and an index.

A scene has a *focus* category and a *focus count*: exactly that many of its emoji belong to the
category, and the count is uniform over 0..4. Counting questions ask about the focus category,
so that no count is more frequent than another.

Validation and test scenes use integer arithmetic and are the same bytes on every machine. The
augmentation of training scenes uses floating point: seeded too, equal up to rounding.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from . import sprites
from .concepts import BY_CATEGORY, CATEGORIES, Concept

SIZE = 64
CELL = 32
CELLS = (("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"))
MAX_COUNT = len(CELLS)
T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """Which concept is in which of the four cells (`None`: empty), and what to count."""

    cells: tuple[Concept | None, Concept | None, Concept | None, Concept | None]
    focus: str
    focus_count: int

    @property
    def present(self) -> list[tuple[int, Concept]]:
        """(cell number, concept) of every emoji."""
        return [(cell, concept) for cell, concept in enumerate(self.cells) if concept is not None]


def generator(split: str, stream: str, index: int) -> np.random.Generator:
    """The random stream for one purpose of one scene; the same on every machine."""
    seed = (zlib.crc32(split.encode()), zlib.crc32(stream.encode()), index)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    order = np.argsort(rng.random(len(items)), kind="stable")
    return [items[i] for i in order]


def compose(split: str, index: int) -> Scene:
    """Choose the concepts of scene `index`; counts cycle over 0..4 with the index."""
    rng = generator(split, "scene", index)
    count = index % (MAX_COUNT + 1)
    fewest = max(count, 2 if rng.random() < 0.9 else 1)
    total = int(rng.integers(fewest, MAX_COUNT + 1))
    focus = pick(rng, CATEGORIES)
    chosen = shuffled(rng, BY_CATEGORY[focus])[:count]
    while len(chosen) < total:
        category = pick(rng, CATEGORIES)
        concept = pick(rng, BY_CATEGORY[category])
        if category != focus and concept not in chosen:
            chosen.append(concept)
    padded = chosen + [None] * (MAX_COUNT - total)
    return Scene(tuple(shuffled(rng, padded)), focus, count)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A light or dark plain colour or a linear gradient, uint8 [SIZE, SIZE, RGB]."""
    low = 0 if rng.random() < 0.25 else 150
    corners = rng.integers(low, low + 106, size=(2, 3))
    if rng.random() < 0.4:
        corners[1] = corners[0]
    ramp = np.arange(SIZE, dtype=np.int64)[:, None]
    line = (corners[0] * (SIZE - 1 - ramp) + corners[1] * ramp) // (SIZE - 1)
    field = np.broadcast_to(line[:, None], (SIZE, SIZE, 3)).astype(np.uint8)
    return np.ascontiguousarray(field.swapaxes(0, 1) if rng.random() < 0.5 else field)


def _jitter(rng: np.random.Generator, tile: np.ndarray) -> np.ndarray:
    """Training only: mix and scale the colours of one RGBA sprite, keep its outline."""
    colour = tile[..., :3].astype(np.float32)
    grey = colour.mean(-1, keepdims=True)
    saturation = rng.uniform(0.3, 1.5)
    mix = np.eye(3) + rng.normal(0.0, 0.12, (3, 3))
    colour = (grey + saturation * (colour - grey)) @ mix.astype(np.float32).T
    colour = (colour - 128) * rng.uniform(0.6, 1.3) + 128 + rng.uniform(-40, 40)
    return np.concatenate([colour.clip(0, 255).astype(np.uint8), tile[..., 3:]], -1)


def _place(rng: np.random.Generator, tile: np.ndarray, augment: bool) -> Image.Image:
    """One sprite scaled, shifted, perhaps mirrored (and, in training, turned) in its cell."""
    side = int(rng.integers(22, 33))
    left, top = (int(rng.integers(0, CELL - side + 1)) for _ in range(2))
    mirrored = rng.random() < 0.5
    if augment:
        tile = _jitter(rng, tile) if rng.random() < 0.7 else tile
    image = Image.fromarray(tile)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment:
        turn, scale = np.deg2rad(rng.normal(0.0, 12.0)), np.exp(rng.normal(0.0, 0.12, 2))
        shear, middle = rng.normal(0.0, 0.08), sprites.TILE / 2
        a, b = np.cos(turn) * scale[0], (np.sin(turn) + shear) * scale[0]
        d, e = -np.sin(turn) * scale[1], np.cos(turn) * scale[1]
        matrix = (a, b, middle * (1 - a - b), d, e, middle * (1 - d - e))
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.BILINEAR)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image.resize((side, side), Image.Resampling.BILINEAR), (left, top))
    return cell


def render(split: str, index: int, scene: Scene) -> np.ndarray:
    """Draw the scene, uint8 [SIZE, SIZE, RGB]; only the training split is augmented."""
    rng = generator(split, "pixels", index)
    augment = split == "train"
    canvas = Image.fromarray(_background(rng))
    for cell, concept in scene.present:
        tile = sprites.load(pick(rng, sprites.STYLES[split]))[concept.index]
        image = _place(rng, tile, augment)
        canvas.paste(image, (cell % 2 * CELL, cell // 2 * CELL), image)
    pixels = np.asarray(canvas)
    if augment and rng.random() < 0.5:
        noise = rng.normal(0.0, rng.uniform(2.0, 12.0), pixels.shape)
        pixels = (pixels + noise).clip(0, 255).astype(np.uint8)
    return pixels
