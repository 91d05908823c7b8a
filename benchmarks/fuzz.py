"""Mutate inputs of every kind, and see that each is refused in one line or answered alike.

    python benchmarks/fuzz.py                  2,000 inputs of each kind; half an hour on one core
    python benchmarks/fuzz.py --count 100      fewer

A failure is a traceback, a hang of more than a minute, an answer that differs in silence, or
something half-written that is left. `tests/fuzz` makes the inputs and looks at the outcomes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import write_result  # noqa: E402

from tests.fuzz.groups import GROUPS  # noqa: E402
from tests.fuzz.run import run  # noqa: E402

WHAT = "mutated inputs of every kind, and what became of them"


def rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each group of inputs."""
    outcomes = sorted({name for group in found.values() for name in group["outcomes"]})
    return [
        {
            "input": name,
            "inputs": group["inputs"],
            **{outcome: group["outcomes"].get(outcome, 0) for outcome in outcomes},
            "failures": len(group["failures"]),
            "slowest, seconds": group["slowest_seconds"],
        }
        for name, group in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=2_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = rows(run(list(GROUPS), count=options.count, seed=options.seed))
    arguments = f"--count {options.count} --seed {options.seed}"
    write_result("fuzz", WHAT, found, arguments=arguments, load=load)
    raise SystemExit(any(row["failures"] for row in found))


if __name__ == "__main__":
    main()
