"""Write the accuracy table of README.md from results/, between its two marks.

python readme_table.py
"""

import json
import re

from emojivqa.questions import TYPES
from evaluate import HERE

MARKS = re.compile(r"(?<=<!-- accuracy: begin -->\n).*(?=<!-- accuracy: end -->)", re.DOTALL)
SPLITS = ("validation", "test")
CONTROLS = ("blind", "majority", "chance")
COLUMNS = (
    "type",
    *(f"{name}, {split}" for split in SPLITS for name in ("student", "teacher", "difference")),
    "blind student, test",
    "majority, test",
    "chance",
)


def plus_minus(value: float, stderr: float, sign: str = "") -> str:
    return f"{value:{sign}.1f} ± {stderr:.1f}"


def table(results: dict[str, dict]) -> str:
    """Markdown; `results` are those of evaluate.py under `student_test` and so on."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for kind in (*TYPES, "all"):
        rows = {key: (found["types"] | found)[kind] for key, found in results.items()}
        cells = [f"`{kind}`" if kind in TYPES else kind]
        for split in SPLITS:
            for name in ("student", "teacher"):
                row = rows[f"{name}_{split}"]
                cells.append(plus_minus(row["accuracy"], row["stderr"]))
            pair = results[f"teacher_{split}"]["against"][kind]
            cells.append(plus_minus(pair["difference"], pair["stderr"], "+"))
        controls = rows["student_test"]
        cells += [f"{controls[key]:.1f}" if key in controls else "" for key in CONTROLS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rendered(readme: str) -> str:
    """`readme` with the table of the committed results."""
    folder = HERE / "results"
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return MARKS.sub(lambda _: "\n" + table(results) + "\n", readme)


if __name__ == "__main__":
    path = HERE / "README.md"
    path.write_text(rendered(path.read_text()))
