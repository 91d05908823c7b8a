"""Questions about a scene: five types, each with a one or two word answer."""

from dataclasses import dataclass

import numpy as np

from .concepts import BY_CATEGORY, CATEGORIES, CONCEPTS, PLURAL
from .scenes import CELLS, Scene, compose, generator, pick, shuffled

TYPES = ("name", "where", "count", "exist", "category")


@dataclass(frozen=True)
class Question:
    type: str
    text: str
    answer: str


def name(scene: Scene, cell: int) -> Question:
    row, column = CELLS[cell]
    return Question("name", f"what is at the {row} {column} ?", scene.cells[cell].name)


def where(scene: Scene, cell: int) -> Question:
    return Question("where", f"where is the {scene.cells[cell].name} ?", " ".join(CELLS[cell]))


def count(scene: Scene, category: str) -> Question:
    number = sum(concept.category == category for _, concept in scene.present)
    return Question("count", f"how many {PLURAL[category]} are there ?", str(number))


def exist(scene: Scene, word: str) -> Question:
    answer = "yes" if any(concept.name == word for _, concept in scene.present) else "no"
    return Question("exist", f"is there a {word} ?", answer)


def category(scene: Scene, cell: int) -> Question:
    row, column = CELLS[cell]
    text = f"what kind of thing is at the {row} {column} ?"
    return Question("category", text, scene.cells[cell].category)


def absent(rng: np.random.Generator, scene: Scene, hard: bool) -> str:
    """A concept that is not in the scene; a hard one shares its category with one that is."""
    present = [concept for _, concept in scene.present]
    kind = pick(rng, present).category if hard else pick(rng, CATEGORIES)
    return pick(rng, [concept.name for concept in BY_CATEGORY[kind] if concept not in present])


def evaluation_questions(split: str, index: int) -> list[Question]:
    """One question of each type about scene `index`; yes and no alternate with the index."""
    scene = compose(split, index)
    rng = generator(split, "questions", index)
    cells = [pick(rng, scene.present)[0] for _ in range(4)]
    missing = absent(rng, scene, hard=index % 4 == 1)
    return [
        name(scene, cells[0]),
        where(scene, cells[1]),
        count(scene, scene.focus),
        exist(scene, scene.cells[cells[2]].name if index % 2 == 0 else missing),
        category(scene, cells[3]),
    ]


def training_questions(split: str, index: int, total: int) -> list[Question]:
    """`total` questions about scene `index`, the five types equally often on average."""
    scene = compose(split, index)
    rng = generator(split, "questions", index)
    cells = shuffled(rng, [cell for cell, _ in scene.present])
    made: list[Question] = []
    for turn in range(total):
        kind = TYPES[turn % len(TYPES)]
        cell = cells[turn // len(TYPES) % len(cells)]
        if kind == "name":
            made.append(name(scene, cell))
        elif kind == "where":
            made.append(where(scene, cell))
        elif kind == "category":
            made.append(category(scene, cell))
        elif kind == "count":
            focus = scene.focus if turn < len(TYPES) else pick(rng, CATEGORIES)
            made.append(count(scene, focus))
        else:
            present = rng.random() < 0.5
            missing = absent(rng, scene, hard=rng.random() < 0.5)
            made.append(exist(scene, scene.cells[cell].name if present else missing))
    return made


def words() -> list[str]:
    """Every word of questions and answers, in a fixed order."""
    fixed = "what is at the top bottom left right where how many are there a kind of thing ?"
    numbers = [str(number) for number in range(len(CELLS) + 1)]
    names = [concept.name for concept in CONCEPTS]
    kinds = [word for pair in PLURAL.items() for word in pair]
    return [*fixed.split(), "yes", "no", "nothing", *numbers, *kinds, *names]
