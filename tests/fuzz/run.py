"""Try mutated inputs of every group: no traceback, no hang, no silent difference, nothing left.

    python -m tests.fuzz.run --count 2000 [--out FILE.json] [--group NAME] [--seed N]

Input N of a group is made from its seed alone: `--group NAME --first N --count 1` makes it again.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.groups import GROUPS, Group, Silent, restored

SECONDS = 60
"""More is a hang."""


class Hang(BaseException):
    """Raised in an input that takes too long."""


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Hang` inside after `SECONDS`; a timer that ran before goes on afterwards."""

    def end(*_: object) -> None:
        raise Hang

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, end)
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            rest = max(0.001, left - (time.monotonic() - started))
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def run_group(
    name: str, group: Group, good: Path, work: Path, *, count: int, seed: int, first: int = 0
) -> dict[str, Any]:
    """Outcomes, and every failure with the input that it came from."""
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest = 0.0
    known: dict[str, Any] = {}
    try:
        for number in range(first, first + count):
            rng = random.Random(f"{seed} {name} {number}")
            restored(good, work)
            before = names(work)
            started = time.monotonic()
            kind = ""
            try:
                with watched():
                    found = group.attempt(rng, work, known)
                outcomes[found] += 1
                if found == "refused" and names(work) - before:
                    kind, detail = "left", str(sorted(names(work) - before)[:3])
            except Hang:
                kind, detail = "hang", f"more than {SECONDS} s"
            except Silent as error:
                kind, detail = "silent", str(error)
            except Exception:
                kind, detail = "traceback", traceback.format_exc()[-2_000:]
            slowest = max(slowest, time.monotonic() - started)
            if kind:
                failures.append({"input": number, "kind": kind, "detail": detail})
    finally:
        known.get("stop", lambda: None)()
    return {
        "inputs": count,
        "outcomes": dict(sorted(outcomes.items())),
        "failures": failures,
        "slowest_seconds": round(slowest, 1),
    }


def names(folder: Path) -> set[str]:
    """Of everything in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(chosen: Sequence[str], *, count: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Group -> what `run_group` found."""
    found = {}
    made: dict[Any, Path] = {}
    with tempfile.TemporaryDirectory(prefix="gracec-fuzz-") as root:
        for name in chosen:
            group = GROUPS[name]
            good = made.get(group.write)
            if good is None:
                good = made[group.write] = Path(root) / f"good-{len(made)}"
                good.mkdir()
                group.write(good)
            work = Path(root) / "work"
            found[name] = run_group(name, group, good, work, count=count, seed=seed, first=first)
            print(name, json.dumps({k: v for k, v in found[name].items() if k != "failures"}))
            for failure in found[name]["failures"]:
                print(f"  {failure['input']} {failure['kind']}: {failure['detail']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=2_000, help="inputs of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--group", choices=GROUPS, action="append")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    started = time.monotonic()
    groups = run(
        options.group or list(GROUPS),
        count=options.count,
        seed=options.seed,
        first=options.first,
    )
    failed = sum(len(group["failures"]) for group in groups.values())
    result = {
        "seed": options.seed,
        "groups": groups,
        "failures": failed,
        "seconds": round(time.monotonic() - started),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
