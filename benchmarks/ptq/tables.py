"""The results of the comparison as rows, for the scoreboard and for the documentation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import GROUPS, RUNTIMES, TITLES

FOLDER = Path(__file__).resolve().parents[1] / "results" / "ptq"
NAMES: Mapping[tuple[str, str], str] = {
    ("gracec", "weights"): "gracec, weights alone",
    ("gracec", "auto"): "gracec",
    ("gracec", "scales"): "gracec, scales trained (w4a16-scales)",
    ("llmcompressor", "rtn"): "llm-compressor RTN",
    ("llmcompressor", "gptq"): "llm-compressor GPTQ",
    ("llmcompressor", "awq"): "llm-compressor AWQ",
    ("torchao", "hqq"): "torchao HQQ, with zero points",
    ("gptqmodel", "gptq"): "GPTQModel GPTQ",
    ("autoround", "rtn"): "AutoRound, rounding alone",
}
CALIBRATIONS = ("none", "foreign", "same")
Row = dict[str, Any]


def name(tool: str, method: str) -> str:
    """What a reader calls a tool and its method."""
    if method.startswith("light"):
        return f"AutoRound, {method.removeprefix('light')} iterations"
    return NAMES[tool, method]


def found(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every cell that was measured."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def rows(model: str, folder: Path = FOLDER) -> list[Row]:
    """Rows of a model: wide codes before narrow ones, large groups first, the least loss first.

    Each has the fields of a table of the scoreboard. Seconds are of quantizing alone, in wall time
    and of processors; the peak is of the whole process.
    """
    own = [cell for cell in found(folder) if cell["model"] == model]

    def place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
        calibration = CALIBRATIONS.index(cell["calibration"])
        runtime = ("", *RUNTIMES).index(cell["runtime"])
        grid = (-cell["bits"], GROUPS.index(cell["group_size"]), bool(runtime))
        return (*grid, calibration, cell["loss_change_nats"], runtime)

    return [row(cell) for cell in sorted(own, key=place)]


def row(cell: Mapping[str, Any]) -> Row:
    """One line of a table."""
    made = cell["made"]
    called = name(cell["tool"], cell["method"])
    if cell["runtime"]:
        called += f" on {cell['runtime'].replace('-', ', ')}"
    return {
        "weights": called,
        "calibration": cell["calibration"],
        "bits": cell["bits"],
        "group_size": cell["group_size"],
        "bits_per_weight": made["bits_per_weight"],
        "perplexity": cell["perplexity"],
        "loss_change_nats": cell["loss_change_nats"],
        "standard_error": cell["standard_error"],
        "kl_nats": cell["kl_nats"],
        "top1": cell["top1"],
        "seconds": made["seconds"],
        "cpu_seconds": made.get("cpu_seconds"),
        "peak_mib": made["peak_mib"],
        "load": made["load"],
    }


def results(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Name -> a result as `measure.write_result` writes one; models without a cell are missing."""
    whole = {}
    for model, title in TITLES.items():
        cells = [cell for cell in found(folder) if cell["model"] == model]
        if not cells:
            continue
        versions: dict[str, str] = {}
        for cell in cells:
            for package, number in cell["made"]["versions"].items():
                if package != "torch":
                    versions.setdefault(f"{package} ({cell['tool']})", number)
        whole[f"ptq_{model}"] = {
            "what": f"quantization without training, by gracec and by others: {title}",
            "command": f"python benchmarks/ptq/run.py --only '{model}-*' --python TOOL=PYTHON ...",
            "environment": {
                **{key: cells[0]["environment"][key] for key in ("cpu", "cores", "torch")},
                "versions": dict(sorted(versions.items())),
            },
            "rows": rows(model, folder),
        }
    return whole
