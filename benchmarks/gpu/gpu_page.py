"""The results of `check.py` as tables, beside the targets that they are held against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
NOT_RUN = (
    "**Not run on a GPU yet.** There are no figures, and no claim: what is known of CUDA is what a "
    "pretend device and the reading of its kernels say."
)
Row = Mapping[str, Any]
BATCH = 1


def against_targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each target with the figure that was found, "not run" without one."""
    found = {(row["section"], row["item"]): row["figures"] for row in rows if row["figures"]}
    speeds = {
        name: max(
            (
                figures["tokens_per_second"]
                for (_, item), figures in found.items()
                if item.startswith(f"decode {name}, batch {BATCH},")
            ),
            default=None,
        )
        for name in ("bf16", "int4")
    }
    gates = found.get(("serving", "gates"), {})
    steps = {item: figures["ms"] for (_, item), figures in found.items() if "ms" in figures}
    grace = _difference(steps.get("GRACE"), steps.get("teacher's forward"))
    return [
        _row(
            f"decoding in INT4, times bfloat16, batch {BATCH}, the best of each",
            _ratio(speeds["int4"], speeds["bf16"]),
            "at least 3",
            lambda value: value >= 3,
        ),
        _row(
            "weights of the linears that are quantized, % less than in bfloat16",
            gates.get("linears_saved_percent"),
            "at least 70",
            lambda value: value >= 70,
        ),
        _row(
            "weights of the whole model, % less than in bfloat16",
            gates.get("model_saved_percent"),
            "at least 70",
            lambda value: value >= 70,
        ),
        _row(
            "a step of GRACE without the teacher's forward, times one of fine-tuning",
            _ratio(grace, steps.get("fine-tuning")),
            "at most 1.6",
            lambda value: value <= 1.6,
        ),
    ]


def page(path: Path = RESULT) -> str:
    """What `docs/gpu.md` says of the results."""
    return text(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else NOT_RUN


def text(result: Mapping[str, Any]) -> str:
    """The machine, the targets and everything that was measured, as Markdown."""
    place = result["environment"]
    named = {
        "compute capability": place.get("capability"),
        "GiB of memory": place.get("memory_gib"),
        "driver": place.get("driver"),
        "CUDA": place.get("cuda"),
        "torch": place["torch"],
        **place["versions"],
    }
    machine = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
    small = " Small models, which say nothing of speed." if place["small"] else ""
    parts = [
        f"{place['device']}: {machine}.{small}",
        _table(["what", "found", "target", "reached"], [list(r.values()) for r in result["rows"]]),
    ]
    rows = result["measured"]
    for section in dict.fromkeys(row["section"] for row in rows):
        lines = [
            [row["item"], row["state"], f"{row['seconds']} s", _cell(row)]
            for row in rows
            if row["section"] == section
        ]
        parts += [f"### {section}", _table(["item", "state", "took", "figures"], lines)]
    return "\n\n".join(parts)


def _row(what: str, found: float | None, target: str, reached: Any) -> dict[str, Any]:
    if found is None:
        return {"figure": what, "found": "not run", "target": target, "reached": "-"}
    return {
        "figure": what,
        "found": round(found, 2),
        "target": target,
        "reached": "yes" if reached(found) else "no",
    }


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _cell(row: Row) -> str:
    """Figures of an item, or why there are none."""
    figures = "<br>".join(_lines("", row["figures"]))
    return figures or str(row.get("reason", "")).replace("|", "/").replace("\n", " ")


def _lines(name: str, value: Any) -> Iterable[str]:
    """`name: value` of everything in a mapping, and of a mapping of numbers in one line."""
    if not isinstance(value, Mapping):
        yield f"{name}: {value}"
        return
    known = {key: one for key, one in value.items() if one is not None}
    if name and known and all(isinstance(one, (int, float)) for one in known.values()):
        yield f"{name}: {', '.join(f'{key} {one}' for key, one in known.items())}"
        return
    for key, one in known.items():
        yield from _lines(f"{name} {key}".strip().replace("_", " "), one)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
