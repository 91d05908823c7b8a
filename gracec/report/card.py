"""The model card: README.md of a directory that others load."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import torch
import yaml
from huggingface_hub import ModelCardData
from transformers import __version__ as transformers_version

from gracec._version import __version__
from gracec.backends.base import CardFacts
from gracec.errors import printable
from gracec.recipe import known_recipes
from gracec.report.report import (
    ACCURACY,
    COVERAGE,
    Report,
    accuracy_cells,
    coverage_rows,
    gate_rows,
)


def model_card(
    report: Report, facts: CardFacts, *, source: str, revision: str = "", form: str
) -> str:
    """What a directory holds, how it was made and checked, how good it is and how to load it.

    Args:
        facts: of the format.
        source: name of the model that was compiled; may be empty.
        revision: its commit on the Hugging Face Hub, if it is from there.
        form: name of the format.
    """
    base = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None  # else the Hub refuses it
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["gracec", "quantized", facts.needs],
    )
    recipe = str(report.recipe.get("name", "recipe"))
    argument = recipe if recipe in known_recipes() else f"{recipe}.yaml"
    model = source or "MODEL"
    at = f" at revision {_plain(revision)}" if revision else ""
    pinned = f" --revision {_word(revision)}" if revision else ""
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_plain(source.rpartition('/')[2] or 'Model')}, {_plain(recipe)}",
        f"{_plain(model)}{at}, compiled by gracec {__version__}: {facts.weights}.",
        "## Load it\n\n"
        f"    pip install transformers {facts.needs}\n\n"
        "```python\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        "model = AutoModelForImageTextToText.from_pretrained(DIR)\n"
        "processor = AutoProcessor.from_pretrained(DIR)\n"
        "```",
        "## Data and accuracy\n\n" + _accuracy(report),
        f"## What was checked\n\nWhen this directory was written, every quantized weight was read "
        f"back and compared with codes times scales: equal bits. {facts.tested} "
        f"Written with transformers {transformers_version}, torch {torch.__version__}.",
        "## Coverage\n\n" + _table(COVERAGE, coverage_rows(report.plan)),
        "## Sizes and gates\n\n" + _table(("figure", "value"), _figures(report)),
        "## Recipe\n\n" + _block("yaml", yaml.safe_dump(dict(report.recipe), sort_keys=False)),
        f"    gracec compile {_word(model)}{pinned} --recipe {_word(argument)} --format {form} "
        "--out DIR",
    ]
    return "\n\n".join(sections) + "\n"


def _accuracy(report: Report) -> str:
    """What it was made with, and how many questions it answers like the expected answer."""
    made = _calibrated(report)
    if report.training:
        best = report.training["best_step"]
        kept = f"of which the state after step {best} was kept."
        if best is None:
            kept = "after none of which it was better than by calibration alone, which was kept."
        made = f"Trained for {report.training['steps']} optimizer steps, {kept}"
    found = report.accuracy
    if not found:
        return f"{made} Its accuracy was not measured; `gracec eval DIR --data DATA` does."
    difference = found["difference"]
    table = _table(ACCURACY, accuracy_cells(found))
    return (
        f"{made} Exact match on {_plain(found['data'])}, ± standard error:\n\n{table}\n\n"
        f"Compiled against original on the same questions: {difference['difference']:+.1%} "
        f"±{difference['standard_error']:.1%}."
    )


def _calibrated(report: Report) -> str:
    """What scales and codes were chosen by, without a training."""
    if any(row.codes for row in report.plan):
        line = report.output_error_line()
        return f"Scales and codes were calibrated on data{line and f': {line}'}."
    if any((report.recipe.get("activations") or {}).values()):
        return "Scales were calibrated on data."
    if (report.recipe.get("calibration") or {}).get("method") == "moments":
        return "Scales were calibrated on second moments of inputs."  # of data, or synthetic
    return "No data was used to quantize it."


def _figures(report: Report) -> list[tuple[str, ...]]:
    """Bytes of the weights, then every gate with what it found."""
    rows: list[tuple[str, ...]] = [
        (f"bytes, {kind}", f"{size:,}") for kind, size in report.sizes.items()
    ]
    return [*rows, *gate_rows(report.gates)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A text of others in one line that is no Markdown and no HTML."""
    marked = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", marked)


def _block(language: str, text: str) -> str:
    """A block of code whose text cannot end it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def _word(text: str) -> str:
    """A text of others as one word of a command."""
    return shlex.quote(printable(text))
