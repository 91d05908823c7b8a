"""Scenes are the same bytes everywhere, and hold what they say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from emojivqa import sprites
from emojivqa.concepts import CATEGORIES, CONCEPTS
from emojivqa.scenes import CELL, SIZE, compose, render

GOLDEN = Path(__file__).with_name("scenes.sha256")


def fingerprint(split: str, index: int) -> str:
    scene = compose(split, index)
    names = " ".join(concept.name if concept else "-" for concept in scene.cells)
    return hashlib.sha256(names.encode() + render(split, index, scene).tobytes()).hexdigest()


@pytest.mark.parametrize("line", GOLDEN.read_text().splitlines())
def test_scene_has_the_recorded_bytes(line: str) -> None:
    split, index, digest = line.split()
    assert fingerprint(split, int(index)) == digest


def test_scenes_do_not_depend_on_what_was_drawn_before() -> None:
    alone = fingerprint("validation", 7)
    np.random.seed(1)
    fingerprint("validation", 3)
    assert fingerprint("validation", 7) == alone
    assert fingerprint("test", 7) != alone


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_focus_count_is_the_number_of_that_category(split: str) -> None:
    for index in range(200):
        scene = compose(split, index)
        concepts = [concept for _, concept in scene.present]
        assert 1 <= len(concepts) <= 4
        assert len(set(concepts)) == len(concepts)
        assert sum(c.category == scene.focus for c in concepts) == scene.focus_count == index % 5


def test_emoji_are_drawn_in_their_cells_and_nowhere_else() -> None:
    """Where a cell is empty the background goes on; where it is not, something else is there."""
    for index in range(40):
        scene = compose("validation", index)
        pixels = render("validation", index, scene)
        assert pixels.shape == (SIZE, SIZE, 3)
        assert pixels.dtype == np.uint8
        for number, concept in enumerate(scene.cells):
            row, column = number // 2 * CELL, number % 2 * CELL
            cell = pixels[row : row + CELL, column : column + CELL].astype(int)
            # A background is plain or a linear ramp along one axis: one axis is constant.
            plain = not np.ptp(cell, axis=0).any() or not np.ptp(cell, axis=1).any()
            assert plain == (concept is None)


def test_no_split_sees_the_artwork_of_another() -> None:
    styles = [style for split in sprites.STYLES.values() for style in split]
    assert len(styles) == len(set(styles)) == 7


def test_every_style_draws_every_concept_differently() -> None:
    for style in (style for split in sprites.STYLES.values() for style in split):
        tiles = sprites.load(style)
        assert tiles.shape == (len(CONCEPTS), sprites.TILE, sprites.TILE, 4)
        assert ((tiles[..., 3] > 128).mean((1, 2)) > 0.1).all()
        assert len({tile.tobytes() for tile in tiles}) == len(CONCEPTS)


def test_concepts_are_single_distinct_words() -> None:
    names = [concept.name for concept in CONCEPTS]
    assert len(set(names)) == len(names) == 144
    assert all(name.isalpha() and name.islower() for name in names)
    assert {concept.category for concept in CONCEPTS} == set(CATEGORIES)
