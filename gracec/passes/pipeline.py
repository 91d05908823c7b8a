"""Passes in order, as a value and as text.

    analyze-modality,plan-quantization{recipe=w4a16-ptq strict=true},insert-fake-quant

What `str` prints is what `parse_pipeline` reads. Further passes say where they go:

    protect-fragile{floor=20.0} after plan-quantization
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

from gracec.errors import GracecError
from gracec.passes.base import PASSES, Pass
from gracec.passes.options import QUOTED, read_options
from gracec.registry import lookup, nearest

Side = Literal["before", "after"]
SIDES: tuple[Side, ...] = ("before", "after")
_PASS = re.compile(rf'\s*([^\s,{{}}"]+)\s*(?:\{{((?:{QUOTED}|[^{{}}"])*)\}})?\s*', re.DOTALL)


@dataclass(frozen=True)
class Placed:
    """A further pass and where in a pipeline it goes.

    Attributes:
        anchor: the name of the pass that it stands next to.
    """

    item: Pass
    side: Side
    anchor: str

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise GracecError(
                f"a pass is placed before or after another, not {self.side!r}",
                where=self.item.name,
            )

    def __str__(self) -> str:
        return f"{self.item} {self.side} {self.anchor}"


class Pipeline(tuple[Pass, ...]):
    """Passes in the order in which they run."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(str(item) for item in self)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self)

    def without(self, *names: str) -> Pipeline:
        """The pipeline without the passes of these names.

        Raises:
            GracecError: for a name that is no pass, or that of one which is not in the pipeline.
        """
        for name in names:
            if name not in self.names:
                PASSES.get(name)
                raise GracecError(
                    f"{name} is not in the pipeline", where=str(self), fix=nearest(name, self.names)
                )
        return Pipeline(item for item in self if item.name not in names)

    def placed(self, further: Iterable[Placed]) -> tuple[Pipeline, tuple[Placed, ...]]:
        """The pipeline with further passes, and those whose anchor is not in it.

        Several at one anchor keep their order, and one may be the anchor of another. Of an anchor
        that stands in the pipeline more than once, it is before the first or after the last.
        """
        places = [_Place(item) for item in self]
        known = {place.item.name: (place, place) for place in reversed(places)}
        for place in places:
            known[place.item.name] = (known[place.item.name][0], place)
        left, waiting = list(further), 0
        while left and len(left) != waiting:  # until none finds its anchor any more
            waiting, again = len(left), left
            left = []
            for one in again:
                if one.anchor not in known:
                    left.append(one)
                    continue
                place = _Place(one.item)
                first, last = known[one.anchor]
                (first.before if one.side == "before" else last.after).append(place)
                known.setdefault(one.item.name, (place, place))
        return Pipeline(item for place in places for item in place.items()), tuple(left)


@dataclass(frozen=True)
class _Place:
    """A pass and what was placed next to it."""

    item: Pass
    before: list[_Place] = field(default_factory=list)
    after: list[_Place] = field(default_factory=list)

    def items(self) -> Iterator[Pass]:
        for place in self.before:
            yield from place.items()
        yield self.item
        for place in self.after:
            yield from place.items()


def parse_pipeline(text: str) -> Pipeline:
    """Passes from text: `analyze-modality,plan-quantization{recipe=w4a16-ptq},insert-fake-quant`.

    Raises:
        GracecError: for an unknown pass or option, with the nearest known name.
    """
    items, place = [], 0
    while True:
        found = _PASS.match(text, place)
        end = found.end() if found is not None else place
        if found is None or text[end : end + 1] not in ("", ","):
            raise GracecError(
                f"cannot read the pipeline {text!r}", fix="write it as pass,pass{option=value}"
            )
        items.append(_build(found))
        if end == len(text):
            return Pipeline(items)
        place = end + 1


def parse_placed(text: str) -> Placed:
    """A further pass from text: `protect-fragile{floor=20} after plan-quantization`.

    Raises:
        GracecError: for an unknown pass, option or anchor, with the nearest known name.
    """
    found = _PASS.match(text)
    words = text[found.end() :].split() if found is not None else []
    if found is None or len(words) != 2 or words[0] not in SIDES:
        raise GracecError(
            f"cannot read where the pass goes: {text!r}",
            fix="write it as pass{option=value} after pass, or before",
        )
    side, anchor = words
    lookup(anchor, PASSES.all(), "pass")
    return Placed(_build(found), cast(Side, side), anchor)


def _build(found: re.Match[str]) -> Pass:
    name, options = found.groups()
    cls = PASSES.get(name)
    return cls(**read_options(options or "", cls, name))
