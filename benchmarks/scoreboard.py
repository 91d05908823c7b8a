"""Write benchmarks/README.md, the scoreboard, from the results that are committed.

python benchmarks/scoreboard.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

sys.path.append(str(Path(__file__).resolve().parent / "ptq"))
import tables as ptq

PAGE = RESULTS.parent / "README.md"
DECODE = (
    "The fast mode decodes at least 7 times as fast as torch in float32, 3 times as fast as in "
    "bfloat16 and 1.3 times as fast as llama.cpp, at 60 % of the memory bandwidth or more; it "
    "reads a prompt at least 2 times as fast as llama.cpp; its weights take at most 30 % of "
    "bfloat16; an export takes at most 60 s."
)
TARGETS = {
    "scale_search": "A 7B model in minutes on two cores; at most 1.5 layers of memory on top.",
    "compile_memory": "A peak of at most 2 times the bfloat16 weights.",
    "plan": "Memory and seconds within 15 % of what is measured.",
    "sharded_memory": "Memory within 15 % of what is measured.",
    "qat_step": "QAT at most 1.15 times the fine-tuning step of the same model.",
    "loader": "With one worker at most 5 % of a step is spent waiting for its samples.",
    "head_and_loss": "A peak that depends on the chunk and not on the number of positions.",
    "decode_smollm2": DECODE,
    "decode_1b": DECODE,
    "ptq_smollm2": "At 4 bits and groups of 128 at most 0.25 nats without data, 0.13 calibrated on "
    "foreign text, and 0.08 on the same text, below every peer there; on foreign text at most 0.12 "
    "in groups of 64 and 0.09 in groups of 32.",
    "gpu": "On a GPU, at 1.4 billion weights: INT4 decodes a prompt alone at least 3 times as fast "
    "as bfloat16; weights take at least 70 % less; a step of GRACE without the teacher's forward "
    "takes at most 1.6 times one of fine-tuning.",
    "ptq_large": "A decoder of 1.1 billion weights calibrated in at most 15 minutes on two cores, "
    "within a peak of 2 times its bfloat16 weights.",
}
"""What each benchmark is held against; a target that is missed stays here with its figure."""
SCRIPTS = {
    "decode_smollm2": "decode/run.py --model smollm2",
    "decode_1b": "decode/run.py --model 1b",
    "gpu": "gpu/check.py",
    "ptq_smollm2": "ptq/run.py --only 'smollm2-*'",
    "ptq_large": "ptq/large.py",
}
"""Of a result whose script has another name."""

PAGES = {"mutations": "../docs/mutations.md"}
"""Of a result whose rows have a page of their own."""

INTRODUCTION = """# Scoreboard

What was measured, on which machine, and the command that measures it again. `load` is the load
average when a benchmark began: 0 is a quiet machine. No test fails on a time or on a size; targets
are written beside the figures, reached or not.

This page is written by `python benchmarks/scoreboard.py` from `benchmarks/results/`.
"""


def command(name: str) -> str:
    """How a result is measured."""
    return f"python benchmarks/{SCRIPTS.get(name, f'{name}.py')}"


def section(name: str, result: Mapping[str, Any]) -> str:
    """One benchmark: what, where, how, the target and its tables."""
    place = result["environment"]
    where = f"{place['cpu']}, {place['cores']} cores, torch {place['torch']}"
    where = f"{place['device']}, {where}" if "device" in place else where
    if place.get("load_at_start") is not None:
        where += f", load {place['load_at_start']}"
    if place.get("versions"):
        where += "".join(f", {name} {number}" for name, number in place["versions"].items())
    target = f"\nTarget: {TARGETS[name]}\n" if name in TARGETS else ""
    if name in PAGES:
        tables = f"{len(result['rows'])} rows: [{Path(PAGES[name]).name}]({PAGES[name]})."
    else:
        tables = "\n\n".join(table(rows) for rows in same_fields(result["rows"]))
    return f"## {result['what']}\n\n    {result['command']}\n\n{where}.\n{target}\n{tables}\n"


def same_fields(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows in the order given, those with equal fields together."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    return list(groups.values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; a row alone is turned, a field a line."""
    if len(rows) == 1 and len(rows[0]) > 6:
        lines = [["figure", "value"], ["---", "---:"]]
        lines += [[label(field), text(value)] for field, value in rows[0].items()]
    else:
        lines = [[label(field) for field in rows[0]], ["---:"] * len(rows[0])]
        lines += [[text(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(field: str) -> str:
    return field.replace("_mib", ", MiB").replace("_", " ")


def text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(text(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def scoreboard() -> str:
    """The whole page."""
    results = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}
    results |= ptq.results()
    sections = [section(name, results[name]) for name in sorted(results)]
    missing = [name for name in TARGETS if name not in results]
    sections += [
        f"## Not measured yet\n\n    {command(name)}\n\nTarget: {TARGETS[name]}\n"
        for name in missing
    ]
    return "\n".join([INTRODUCTION, *sections])


def main() -> None:
    PAGE.write_text(scoreboard(), encoding="utf-8")
    print(Path(PAGE.name))


if __name__ == "__main__":
    main()
