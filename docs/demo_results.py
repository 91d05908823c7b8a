"""Keep the README's figures equal to a run of the demo.

    make demo                            writes out/demo/result.json and out/demo/answers.png
    python docs/demo_results.py          copies them to docs/results/ and into the README

The README's block is rendered from docs/results/demo.json alone; a test checks that it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs/results/demo.json"
PICTURE = ROOT / "docs/results/answers.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"


def render(result: dict[str, Any]) -> str:
    """The README block of a demo result."""
    models = result["models"]
    columns = [*models, "blind", "majority", "chance"]
    rows = [["% right", "n", *columns]]
    first = next(iter(models.values()))
    for row in [*first["types"], "overall"]:
        scores = [m["overall"] if row == "overall" else m["types"][row] for m in models.values()]
        blind = max(score["blind_accuracy"] for score in scores)
        rows.append(
            [
                row,
                str(scores[0]["n"]),
                *(percent(s["accuracy"], s["standard_error"]) for s in scores),
                percent(blind),
                percent(scores[0]["majority"]),
                percent(scores[0]["chance"]),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        table.append("  ".join(cells).rstrip())
    changes = result["minus_full_precision"].items()
    sizes = result["weight_bytes"]
    lines = [
        "```",
        *table,
        "",
        *(
            f"{name} against the student in full precision, same questions: "
            f"{100 * change['difference']:+.1f} ±{100 * change['standard_error']:.1f} points"
            for name, change in changes
        ),
        f"weights: float32 {kib(sizes['float32'])}, bfloat16 {kib(sizes['bfloat16'])}, "
        f"INT4 {kib(sizes['compiled'])}",
        "```",
    ]
    return "\n".join(lines)


def percent(share: float, error: float | None = None) -> str:
    """ "59.1" or "59.1 ±0.8"."""
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ±{100 * error:.1f}"


def kib(size: int) -> str:
    """Bytes as KiB with a thousands separator."""
    return f"{size / 1024:,.0f} KiB"


def block_of(text: str) -> str:
    """What stands between the markers."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "out/demo", help="output of the demo")
    demo = parser.parse_args().demo
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(demo / "result.json", RESULT)
    shutil.copyfile(demo / "answers.png", PICTURE)
    text = README.read_text(encoding="utf-8")
    block = render(json.loads(RESULT.read_text(encoding="utf-8")))
    README.write_text(text.replace(block_of(text), block), encoding="utf-8")


if __name__ == "__main__":
    main()
