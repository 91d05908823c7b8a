"""Write the report page of artifacts: read them, ask them, draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gracec.compiler import load
from gracec.data.questions import VqaSample
from gracec.directories import write_file
from gracec.errors import GracecError
from gracec.evaluate import VqaReport, evaluate_vqa
from gracec.inspection import inspect_artifact
from gracec.models.hub import Named, Place, find_artifact, find_description
from gracec.report.page import render_page
from gracec.store import read_manifest


def write_report_page(
    artifacts: Sequence[Named], output: Path | None = None, samples: Sequence[VqaSample] = ()
) -> Path:
    """Write the report of the first artifact, beside the others.

    Args:
        artifacts: directories of gracec artifacts, or names of the Hugging Face Hub; the page is
            about the first one.
        output: the file to write; by default `report.html` in the directory of the first one.
        samples: questions that every artifact is asked, to show answers that differ.

    Returns:
        The file that was written.

    Raises:
        GracecError: if one is no artifact, or the file cannot be written.
    """
    find = find_artifact if samples else find_description
    places = [find(artifact) for artifact in artifacts]
    first = places[0]
    if output is None and first.revision:
        raise GracecError(
            "nothing is written into the cache of the Hugging Face Hub",
            where=first.name,
            fix="give the file to write (--out)",
        )
    output = output or first.path / "report.html"
    reports = {_name(place, places): inspect_artifact(place) for place in places}
    answered = {
        name: _answers(place.path, samples) if samples else None
        for name, place in zip(reports, places, strict=True)
    }
    page = render_page(reports, read_manifest(first.path).source, samples, answered)
    write_file(output, page)
    return output


def _name(place: Place, places: Sequence[Place]) -> str:
    """The name of one, or its whole path where two are called the same."""
    same = [other for other in places if other.name == place.name]
    return place.name if len(same) == 1 else str(place)


def _answers(directory: Path, samples: Sequence[VqaSample]) -> VqaReport:
    compiled = load(directory, "torchao")
    return evaluate_vqa(compiled, compiled.processor, samples, blind=False)
