"""The directory of a run, a training or a calibration: one process at a time, and what a user put
there stays.

OUT.training/.lock            held by the process that trains, as long as it lives
OUT.training/step-00000042    checkpoints; see `gracec.training.checkpoints.directory`
OUT.training/calibrated       corrected codes so far; see `gracec.training.calibration_run`
OUT.training/answers          of a teacher so far; see `gracec.training.teacher_answers`
OUT.training/metrics.jsonl    a row for each optimizer step
OUT.training/events.out.*     of TensorBoard, by versions that wrote it there
OUT.training/frozen           what the training came to, until the result is published
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gracec.directories import (
    cannot_write,
    clear_leftovers,
    files_in,
    foreign_files,
    hold,
    is_artifact,
    let_go,
    listing,
    remove_artifact,
)
from gracec.errors import GracecError, GracecWarning
from gracec.training.calibration_run import CALIBRATED, calibrated_sets
from gracec.training.checkpoints.directory import checkpoints, clean, foreign_to, remove
from gracec.training.curve import METRICS
from gracec.training.ranks import rank
from gracec.training.teacher_answers import ANSWERS, answers_kept

LOCK, FROZEN, EVENTS = ".lock", "frozen", "events.out.tfevents."


@contextmanager
def alone_in(directory: Path | None) -> Iterator[None]:
    """Keep other processes out of the directory of a run; it is made, and goes if nothing came in.

    Of the ranks of a distributed run the first holds the lock. None is nothing to hold.

    Raises:
        GracecError: if another process is training there, or the directory cannot be written.
    """
    if directory is None or rank():
        yield
        return
    busy = GracecError(
        "another process is training here",
        where=str(directory),
        fix="wait for it, or choose another output directory",
    )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(directory, LOCK, busy)
    except OSError as error:
        raise cannot_write(directory, error) from error
    try:
        yield
    finally:
        let_go(lock)


def open_run(directory: Path, *, resume: bool) -> list[str]:
    """Check that a run can begin, or go on, in a directory, and clear what killed saves left there.

    Returns:
        A line for each thing that was left.

    Raises:
        GracecError: if an earlier run was interrupted there, or, where it should go on, there is
            none but files of somebody else.
    """
    foreign, own = foreign_to_run(directory), bool(checkpoints(directory))
    own |= bool(calibrated_sets(directory) or answers_kept(directory))
    if resume and foreign and not own:
        raise GracecError(
            f"no run was interrupted here, and it holds {listing(foreign)}",
            where=str(directory),
            fix="move that elsewhere, or choose another output directory",
        )
    if not resume and any(path.name != LOCK for path in _entries(directory)):
        what = "an earlier run was interrupted here"
        fix = "go on with resume=True (--resume), or remove it"
        if foreign and not own:
            what = f"it is where checkpoints go, and holds {listing(foreign)}"
            fix = "move that elsewhere, or choose another output directory"
        raise GracecError(what, where=str(directory), fix=fix)
    return [*clean(directory), *clear_leftovers(directory / FROZEN)]


def foreign_to_run(directory: Path) -> list[str]:
    """Names, in the directory of a run, of what gracec did not write there."""
    own = {LOCK, METRICS, FROZEN, CALIBRATED, ANSWERS, f".{FROZEN}.gracec"}
    runs = {path.name: path for path in checkpoints(directory)}
    left = {n for n in map(_name, _entries(directory)) if n.startswith((".step-", EVENTS))}
    names = [n for n in map(_name, _entries(directory)) if n not in own | runs.keys() | left]
    frozen = directory / FROZEN
    within = {name: foreign_to(path) for name, path in runs.items()}
    sets = {path.name for path in calibrated_sets(directory)}
    rooms = {f".{name}.gracec" for name in sets}
    within[CALIBRATED] = [
        name for name in map(_name, _entries(directory / CALIBRATED)) if name not in sets | rooms
    ]
    replies = {path.name for path in answers_kept(directory)}
    within[ANSWERS] = [n for n in map(_name, _entries(directory / ANSWERS)) if n not in replies]
    within[FROZEN] = foreign_files(frozen) if is_artifact(frozen) else files_in(frozen)
    return sorted([*names, *(f"{at}/{name}" for at, found in within.items() for name in found)])


def kept_of_user(directory: Path) -> list[str]:
    """What to tell of the files that `remove_run` will leave."""
    foreign = foreign_to_run(directory)
    return [f"{directory} stays, for {listing(foreign)} in it"] if foreign else []


def remove_run(directory: Path) -> None:
    """Remove what gracec wrote into the directory of a run; what else is there stays.

    What the system does not let go is a warning: the result is there already.
    """
    try:
        clean(directory)
        for path in checkpoints(directory):
            remove(path)
        for path in calibrated_sets(directory):
            path.unlink()
            clear_leftovers(path)
        for path in answers_kept(directory):
            path.unlink()
        for folder in (directory / CALIBRATED, directory / ANSWERS):
            if folder.is_dir() and not _entries(folder):
                folder.rmdir()
        for path in (directory / METRICS, *directory.glob(f"{EVENTS}*")):
            path.unlink(missing_ok=True)
        clear_leftovers(directory / FROZEN)
        if not files_in(directory / FROZEN) or is_artifact(directory / FROZEN):
            remove_artifact(directory / FROZEN)
    except OSError as error:
        warnings.warn(
            f"{directory}: cannot be removed: {error.strerror}", GracecWarning, stacklevel=2
        )


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _name(path: Path) -> str:
    return path.name
