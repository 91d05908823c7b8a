"""Train, freeze and examine every condition of the evidence table; what is done is not done again.

    python benchmarks/evidence/run.py                  everything that is missing
    python benchmarks/evidence/run.py 'w4a16*' 'w2-*'  only these
    python benchmarks/evidence/run.py --list           what there is and what is missing
    python benchmarks/evidence/run.py --model DIR --name peer-gptq-g128       examine another model

Several of these commands may run at once: each takes the next run that nobody works on. A run
writes benchmarks/results/evidence/NAME-SEED.json: its recipe, its curve, and which questions of the
validation and of the test split it answers. Everything was chosen on the validation split.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import task
import torch
from conditions import Condition, jobs
from torch import Tensor, nn

import gracec
from gracec.models.loading import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import RESULTS, environment

FOLDER = RESULTS / "evidence"
SPLITS = ("validation", "test")
CHOOSING_SCENES = 80
"""Validation scenes whose questions choose the best state of a run with all the data."""


def result_path(name: str, seed: int) -> Path:
    return FOLDER / f"{name}-{seed}.json"


def pack(hits: Tensor) -> str:
    """Right answers, bool [scenes, types], as hexadecimal digits, eight answers in two."""
    bits = "".join("1" if hit else "0" for hit in hits.flatten().tolist())
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def unpack(digits: str) -> Tensor:
    """The inverse of `pack`: bool [scenes, types]."""
    bits = f"{int(digits, 16):0{4 * len(digits)}b}"
    return torch.tensor([bit == "1" for bit in bits]).view(-1, len(task.TYPES))


def examine(model: nn.Module, blind: bool = False) -> dict[str, str]:
    """Right answers on every split."""
    found = {split: pack(task.answers(model, split)) for split in SPLITS}
    if blind:
        found |= {f"{split} blind": pack(task.answers(model, split, True)) for split in SPLITS}
    return found


def original(name: str) -> nn.Module:
    """A shipped model in float32."""
    model: nn.Module = load_model(task.EXAMPLE / name, torch.float32)
    return model


def run(condition: Condition, seed: int) -> dict[str, Any]:
    """Compile the student by one recipe, and ask the result everything."""
    recipe = condition.resolved(seed)
    options: dict[str, Any] = {}
    if condition.scenes:
        first = task.FIRST_NEW_SCENE + seed * 10_000
        scenes = range(first, first + condition.scenes)
        options["train_data"] = task.records("train", scenes, condition.restyled)
        if condition.choose_on_validation:
            options["eval_data"] = task.records("validation", range(CHOOSING_SCENES))
        teachers = {"teacher": task.EXAMPLE / "teacher", "self": None, "": None}
        options["teacher"] = teachers[condition.teacher]
    compiled = gracec.compile(task.EXAMPLE / "student", recipe, progress=False, **options)
    training = compiled.report.training
    return {
        "recipe": recipe.to_dict(),
        "teacher": condition.teacher,
        "scenes": condition.scenes,
        "restyled": condition.restyled,
        "sizes": compiled.report.sizes,
        "sqnr_db": {
            row["fqns"][0]: row["sqnr_db"]
            for row in compiled.report.to_dict()["plan"]
            if row["spec"]
        },
        "held_out": training.get("held_out", []),
        "candidate": training.get("candidate"),
        "best_step": training.get("best_step", 0),
        "curve": [thin(row) for row in training.get("rows", [])[::5]],
        "answers": examine(task.state_of(compiled, original("student"))),
    }


def thin(row: dict[str, Any]) -> dict[str, Any]:
    """What a picture of a run needs of one step."""
    names = ("step", "ce", "distillation", "rcka", "beta", "ema")
    return {name: float(f"{row[name]:.4g}") for name in names if row.get(name) is not None}


def shipped(name: str) -> dict[str, Any]:
    """Student or teacher as they ship."""
    return {"answers": examine(original(name), blind=True)}


def examine_other(directory: Path, name: str, seed: int) -> None:
    """Ask the model that a peer wrote; its peer.json says how it was made."""
    start = time.perf_counter()
    model: nn.Module = load_model(directory, torch.float32)
    made = json.loads((directory / "peer.json").read_text(encoding="utf-8"))
    made = {key: value for key, value in made.items() if key != "modules"}
    result = {"peer": made, "answers": examine(model)}
    write(result_path(name, seed), result, time.perf_counter() - start)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process works on a result; false if it is there or another one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not path.exists()
        lock.unlink(missing_ok=True)


def write(path: Path, found: dict[str, Any], seconds: float) -> None:
    whole = {**found, "seconds": round(seconds), "environment": environment(os.getloadavg()[0])}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of conditions")
    parser.add_argument("--list", action="store_true", help="show what there is")
    parser.add_argument("--model", type=Path, help="a directory that another tool wrote")
    parser.add_argument("--name", help="of its row, with --model")
    parser.add_argument("--seed", type=int, default=0, help="that it was made with, with --model")
    arguments = parser.parse_args()
    if arguments.model is not None:
        if not arguments.name:
            parser.error("--model needs --name")
        examine_other(arguments.model, arguments.name, arguments.seed)
        return
    everything: list[tuple[str, int, Condition | None]] = [
        ("student", 0, None),
        ("teacher", 0, None),
        *((condition.name, seed, condition) for condition, seed in jobs()),
    ]
    for name, seed, condition in everything:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in arguments.names):
            continue
        path = result_path(name, seed)
        if arguments.list:
            print(f"{name}-{seed}: {'done' if path.exists() else 'missing'}")
            continue
        with claimed(path) as mine:
            if not mine:
                continue
            start = time.perf_counter()
            result = shipped(name) if condition is None else run(condition, seed)
            write(path, result, time.perf_counter() - start)
            share = unpack(result["answers"]["validation"]).double().mean().item()
            print(f"{path.name}: validation {share:.2%}, {time.perf_counter() - start:.0f} s")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
