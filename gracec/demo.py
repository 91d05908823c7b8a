"""The demo: compile a shipped student twice, with and without training, and ask every model.

An example is a directory with `teacher/`, `student/` (Hugging Face directories), a training recipe
`grace.yaml` and a script `make_dataset.py --split train|test --out DIR [--limit N]` that writes
questions about pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import gracec
from gracec.directories import cannot_write, write_file
from gracec.errors import GracecError
from gracec.evaluate import (
    VqaReport,
    VqaSample,
    evaluate_vqa,
    format_table,
    load_samples,
)
from gracec.evaluate.scores import paired_difference
from gracec.models.loading import load_model, load_processor

BATCH_SIZE = 64
TRAINING_QUESTIONS = 2500
MARK = ".gracec-demo"
"""File in a folder whose artifacts and data are those of a demo, which the next one replaces."""
PTQ, GRACE = "INT4 PTQ", "INT4 GRACE"


def run_demo(
    example: Path, output: Path, *, limit: int | None = None, console: Console
) -> dict[str, Any]:
    """Compile the student, ask teacher, student and both INT4 students, show and save the answers.

    Writes `output/train` and `output/data` (questions), `output/student-ptq` and
    `output/student-grace` (the artifacts), `output/answers.png` and `output/result.json`, replacing
    those of an earlier run.

    Returns:
        JSON-able: sizes, accuracy by type with standard errors and controls, the training's
        held-out scores, seconds.

    Raises:
        GracecError: if the directory is not an example.
    """
    started = time.perf_counter()
    for name in ("teacher", "student", "grace.yaml", "make_dataset.py"):
        if not (example / name).exists():
            raise GracecError(
                f"{name} is missing",
                where=str(example),
                fix="run it in a checkout of gracec, or give --example DIR",
            )
    data, train = output / "data", output / "train"
    artifacts = {PTQ: output / "student-ptq", GRACE: output / "student-grace"}
    places = (data, train, *artifacts.values(), Path(f"{artifacts[GRACE]}.training"))
    _clear(output, places)
    write_questions(example, "test", data)
    write_questions(example, "train", train, TRAINING_QUESTIONS)
    samples = load_samples(data, limit)

    console.rule("post-training quantization")
    compiled = gracec.compile(example / "student", "w4a16-ptq", output_dir=artifacts[PTQ])
    console.print(compiled.report.coverage_table())
    console.print(compiled.report.gates_table())
    console.print(compiled.report.sizes_line(), highlight=False)
    console.rule("training with a teacher")
    trained = gracec.compile(
        example / "student",
        example / "grace.yaml",
        teacher=example / "teacher",
        train_data=train,
        output_dir=artifacts[GRACE],
    )
    for note in trained.report.notes:
        if note.source == "training":
            console.print(str(note), highlight=False, markup=False)

    console.rule(f"{len(samples)} questions")
    models: dict[str, tuple[Any, Path]] = {
        "teacher fp32": (load_model(example / "teacher", torch.float32), example / "teacher"),
        "student fp32": (load_model(example / "student", torch.float32), example / "student"),
        **{name: (gracec.load(path, "torchao"), path) for name, path in artifacts.items()},
    }
    reports: dict[str, VqaReport] = {}
    for name, (model, directory) in models.items():
        processor = load_processor(directory)
        reports[name] = evaluate_vqa(model, processor, samples, batch_size=BATCH_SIZE)
        accuracy, error = reports[name].overall.accuracy, reports[name].overall.standard_error
        console.print(f"{name}: {accuracy:.1%} ± {error:.1%}", highlight=False)
    console.print(format_table(reports))
    changes = {
        name: paired_difference(reports[name], reports["student fp32"])._asdict()
        for name in artifacts
    }
    for name, change in changes.items():
        console.print(
            f"{name} against the student in full precision, same questions: "
            f"{100 * change['difference']:+.1f} ± {100 * change['standard_error']:.1f} points",
            highlight=False,
        )

    picture = output / "answers.png"
    shown = draw_answers(samples, reports, picture)
    for index in shown:
        shown_image = samples[index].image
        assert shown_image is not None
        answers = {name: report.predictions[index].predicted for name, report in reports.items()}
        console.print(
            f"{shown_image.name}: {samples[index].question} "
            + ", ".join(f"{name}: {answer}" for name, answer in answers.items())
            + f" (right: {samples[index].answer})",
            highlight=False,
            markup=False,
        )
    seconds = time.perf_counter() - started
    console.print(f"picture: {picture}   {seconds:.0f} s", highlight=False)
    result: dict[str, Any] = {
        "questions": len(samples),
        "seconds": round(seconds, 1),
        "weight_bytes": compiled.report.sizes,
        "minus_full_precision": changes,
        "held_out": trained.report.training["held_out"],
        "models": {name: _without_predictions(report) for name, report in reports.items()},
    }
    write_file(output / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def write_questions(example: Path, split: str, folder: Path, limit: int | None = None) -> None:
    """Have the example's script write one split."""
    command = [sys.executable, str(example / "make_dataset.py"), "--split", split]
    command += ["--out", str(folder)] + ([] if limit is None else ["--limit", str(limit)])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_line = done.stderr.strip().rpartition("\n")[2]
        raise GracecError(f"the questions cannot be written: {last_line}", where=command[1])


def draw_answers(
    samples: list[VqaSample], reports: Mapping[str, VqaReport], path: Path
) -> list[int]:
    """A picture of one question of each type with every model's answer: the k-th one of type k.

    Returns:
        The indices of the questions shown.
    """
    from matplotlib.figure import Figure

    of_type: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        of_type.setdefault(sample.type, []).append(index)
    shown = [group[k % len(group)] for k, group in enumerate(of_type.values())]
    figure = Figure(figsize=(2.6 * len(shown), 3.6), layout="constrained")
    for column, index in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), column + 1)
        picture = samples[index].picture()
        assert picture is not None  # the demo's own questions are about pictures
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(samples[index].question, fontsize=9)
        for line, (name, report) in enumerate(reports.items()):
            prediction = report.predictions[index]
            mark = "✓" if prediction.correct else "✗"
            axes.text(
                0.0,
                -0.08 - 0.1 * line,
                f"{name}: {prediction.predicted} {mark}",
                transform=axes.transAxes,
                fontsize=9,
                color="darkgreen" if prediction.correct else "firebrick",
            )
    figure.savefig(path, dpi=110, bbox_inches="tight")  # the answers stand below the axes
    return shown


def _clear(output: Path, places: Sequence[Path]) -> None:
    """Make room in a folder for what the demo writes, where an earlier demo made it.

    Raises:
        GracecError: if something is there that no demo wrote, or the folder cannot be written.
    """
    mark = output / MARK
    found = next((place for place in places if os.path.lexists(place)), None)
    if found is not None and not mark.is_file():
        raise GracecError(
            "it exists, and the demo would write there",
            where=str(found),
            fix="remove it, or choose another folder with --out",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for place in places:
            if place.is_dir():
                shutil.rmtree(place)
        mark.touch()
    except OSError as error:
        raise cannot_write(output, error) from error


def _without_predictions(report: VqaReport) -> dict[str, Any]:
    return {key: value for key, value in report.to_dict().items() if key != "predictions"}
