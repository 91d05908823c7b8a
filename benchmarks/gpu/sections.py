"""Sections of a measurement that has little time: what fails or is not reached is said, not lost.

    results = run(sections, seconds=480, save=write)

A section is some items in order. Each has the time that is left until its section has to end; what
earlier sections saved is there for later ones. An item that takes longer is stopped.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]
Item = tuple[str, Callable[[], Figures]]
DONE, FAILED, STOPPED, NOT_REACHED = "done", "failed", "stopped", "not reached"


@dataclass(frozen=True)
class Section:
    """Items that share what they work on.

    Attributes:
        seconds: its share of the time.
        items: names and what measures them, in order; made when the section begins.
        begins: whether the first item makes what all others measure.
    """

    name: str
    seconds: float
    items: Callable[[], Sequence[Item]]
    begins: bool = True


class OutOfTime(BaseException):
    """Not an `Exception`: nothing on the way may take it for a failure of its own."""


def run(
    sections: Sequence[Section], seconds: float, save: Callable[[list[Figures]], None]
) -> list[Figures]:
    """Measure everything there is time for.

    Args:
        seconds: for all sections, each of which has its share.
        save: called with all rows so far, after each of them.

    Returns:
        A row for each item: `section`, `item`, `state`, `seconds`, `figures`, and `reason` where it
        was not done.
    """
    rows: list[Figures] = []
    share = seconds / sum(section.seconds for section in sections)
    ends = time.monotonic()
    for section in sections:
        ends += share * section.seconds
        items, lacking = deque(enumerate(section.items())), ""
        while items:
            number, (name, measure) = items.popleft()
            found = _not_reached(lacking) if lacking else _measured(measure, ends)
            del measure  # with the last of them goes what they share
            if section.begins and number == 0 and found["state"] != DONE:
                lacking = f"{name} was not done"
            row = {"section": section.name, "item": name, **found}
            print(f"{section.name}, {name}: {row.get('reason', row['state'])}", flush=True)
            rows.append(row)
            save(rows)
    return rows


def _measured(measure: Callable[[], Figures], ends: float) -> Figures:
    """The state of an item, its seconds and figures."""
    start = time.monotonic()
    if ends - start <= 0:
        return _not_reached("no time was left")
    found: Figures = {"state": DONE, "figures": {}}
    try:
        with _until(ends):
            found["figures"] = measure()
    except OutOfTime:
        reason = f"stopped after {time.monotonic() - start:.0f} s"
        found |= {"state": STOPPED, "reason": reason}
    except Exception as error:  # one item must not take the others with it
        reason = f"{type(error).__name__}: {error}"[:1000]
        found |= {"state": FAILED, "reason": reason, "trace": traceback.format_exc()[-3000:]}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _not_reached(reason: str) -> Figures:
    return {"state": NOT_REACHED, "seconds": 0.0, "figures": {}, "reason": reason}


@contextmanager
def _until(ends: float) -> Iterator[None]:
    """Raise `OutOfTime` in what runs inside at a time."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(ends - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
