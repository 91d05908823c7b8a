"""Write the report page of artifacts: read them, ask them, draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gracec.compiler import load
from gracec.data.questions import VqaSample
from gracec.directories import write_file
from gracec.evaluate import VqaReport, evaluate_vqa
from gracec.inspection import inspect_artifact
from gracec.report.page import render_page
from gracec.store import read_manifest


def write_report_page(
    directories: Sequence[Path], output: Path, samples: Sequence[VqaSample] = ()
) -> None:
    """Write the report of the first artifact, beside the others.

    Args:
        directories: gracec artifacts; the page is about the first one.
        output: the file to write.
        samples: questions that every artifact is asked, to show answers that differ.

    Raises:
        GracecError: if a directory is no artifact, or the file cannot be written.
    """
    reports = {_name(path, directories): inspect_artifact(path) for path in directories}
    answered = {
        name: _answers(path, samples) if samples else None
        for name, path in zip(reports, directories, strict=True)
    }
    page = render_page(reports, read_manifest(directories[0]).source, samples, answered)
    write_file(output, page)


def _name(path: Path, directories: Sequence[Path]) -> str:
    """The last part of a path, or all of it where two end the same way."""
    same = [other for other in directories if other.resolve().name == path.resolve().name]
    return path.resolve().name if len(same) == 1 else str(path)


def _answers(directory: Path, samples: Sequence[VqaSample]) -> VqaReport:
    compiled = load(directory)
    return evaluate_vqa(compiled, compiled.processor, samples, blind=False)
