"""The concepts of EmojiVQA: what can be in a scene, and the category of each."""

import csv
from dataclasses import dataclass
from pathlib import Path

PLURAL = {
    "animal": "animals",
    "food": "foods",
    "vehicle": "vehicles",
    "plant": "plants",
    "game": "games",
    "object": "objects",
    "clothing": "clothes",
}
CATEGORIES = tuple(PLURAL)


@dataclass(frozen=True)
class Concept:
    """One row of concepts.tsv; `index` is the number of its tile in every sprite atlas."""

    index: int
    name: str
    category: str


def _read() -> tuple[Concept, ...]:
    with (Path(__file__).parent / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return tuple(Concept(i, row["name"], row["category"]) for i, row in enumerate(rows))


CONCEPTS = _read()
BY_CATEGORY = {
    category: tuple(concept for concept in CONCEPTS if concept.category == category)
    for category in CATEGORIES
}
