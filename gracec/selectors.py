"""How a recipe names some weights of a model: by what they are for and where, or by their names.

decoder.blocks[3].down      decoder.blocks[0..1].attention      decoder.q      projector
model.language_model.layers.*.mlp.down_proj.weight
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PARTS = ("decoder", "head", "module", "projector", "vision")
ROLES: Mapping[str, tuple[str, ...]] = {
    **{role: (role,) for role in ("q", "k", "v", "qkv", "out", "gate", "up", "down")},
    "attention": ("q", "k", "v", "qkv", "out"),
    "mlp": ("gate", "up", "down"),
}
"""What a selector says last -> the roles that it means. `qkv` is one linear for all three."""
PLACE = re.compile(
    rf"(?P<part>{'|'.join(PARTS)})"
    r"(?:\.blocks\[(?P<first>\*|-?\d+)(?:\.\.(?P<last>-?\d+))?\])?"
    rf"(?:\.(?P<role>{'|'.join(ROLES)}))?"
)
HOW_TO = "say decoder.blocks[0..3], decoder.blocks[*].down, projector, or *.down_proj.weight"


@dataclass(frozen=True)
class Place:
    """Where a weight stands.

    Attributes:
        part: as recipes call it.
        block: of the decoder, from 0; None outside of its blocks.
        role: one of `ROLES`, or empty where nothing says it.
    """

    part: str
    block: int | None = None
    role: str = ""


def is_selector(text: str) -> bool:
    """Whether a text can be meant as a place, or as a glob on the names of weights."""
    return PLACE.fullmatch(text) is not None or any(mark in text for mark in "*?[.")


def part_named(selector: str) -> str:
    """The part that a place is in; empty for a glob."""
    found = PLACE.fullmatch(selector)
    return "" if found is None else found["part"]


def fits(selector: str, place: Place, names: Iterable[str], blocks: int) -> bool:
    """Whether a selector means a weight.

    Args:
        names: of the weight in the state dict, more than one where it is tied.
        blocks: of the decoder; negative numbers count from its end.
    """
    found = PLACE.fullmatch(selector)
    if found is None:
        return any(fnmatch.fnmatchcase(name, selector) for name in names)
    if place.part != found["part"]:
        return False
    if found["role"] and place.role not in ROLES[found["role"]]:
        return False
    if found["first"] is None:
        return True
    if place.block is None:
        return False
    if found["first"] == "*":
        return True
    first, last = (
        number + blocks if (number := int(end)) < 0 else number
        for end in (found["first"], found["last"] or found["first"])
    )
    return first <= place.block <= last
