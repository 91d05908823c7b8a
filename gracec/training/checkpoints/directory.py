"""Checkpoints of a training run, at the boundaries of optimizer steps, that resume bit for bit.

    RUN/step-00000042/tensors.safetensors   weights and scales, the best so far, the optimizer,
                                            the states of the random number generators
    RUN/step-00000042/checkpoint.json       everything else, with the sha256 of both

Nothing is pickled, so that reading a checkpoint runs no code. One process at a time writes into
RUN; in a distributed run that is the first rank.

A checkpoint is written beside its place, flushed to the disk and renamed
(`gracec.directories.write_directory`); older ones go only after that. Whatever interrupts it, RUN
holds a whole checkpoint, if it held one before, which `latest_checkpoint` finds. What a killed
process leaves, `.step-*`, is ignored and goes with the next save. Where the checkpoint of the same
step is written again, the old one is called `step-00000042-replaced` meanwhile and counts until the
new one is in place.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from gracec import directories
from gracec.directories import write_directory
from gracec.errors import GracecError, GracecWarning
from gracec.training.checkpoints.fingerprint import Fingerprint
from gracec.training.checkpoints.sealed import (
    CONTENTS,
    TENSORS,
    Checkpoint,
    Damaged,
    all_tensors,
    contents_of,
    damage_of,
    fill,
    fingerprint_of,
    read_contents,
    seems_whole,
)

_NAME = re.compile(r"step-(\d{8,})(-replaced)?")


_LEFTOVER = re.compile(r"\.(step-\d{8,}(-replaced)?)\.(gracec|removed)")
_FILES = (TENSORS, CONTENTS)


def save_checkpoint(
    checkpoint: Checkpoint, fingerprint: Fingerprint, directory: Path, *, keep: int = 2
) -> Path:
    """Write a checkpoint into the directory of a run and remove all but the newest `keep`.

    Returns:
        Its path, DIRECTORY/step-00000042.

    Raises:
        GracecError: if something in it cannot be written as it is, `check_run` refuses the
            directory, or the disk does not take it; what was there before is still there.
    """
    if keep < 1:
        raise GracecError(f"keep is {keep}", fix="keep at least one checkpoint")
    directory = directory.absolute()
    contents = contents_of(checkpoint, fingerprint)
    tensors = all_tensors(checkpoint)
    check_run(directory, fingerprint, checkpoint.step)
    clean(directory)
    target = directory / f"step-{checkpoint.step:08d}"
    aside = target.with_name(f"{target.name}-replaced")
    try:
        if target.is_dir():
            _set_aside(target, aside)
        write_directory(target, lambda path: fill(path, tensors, contents))
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    directories.reached("written")
    _prune(directory, target, keep)
    return target


def check_run(directory: Path, fingerprint: Fingerprint, step: int = 0) -> None:
    """Refuse a directory in which a run that is at `step` would overwrite another one.

    Raises:
        GracecError: if a checkpoint there is of another run or whole and of a later step.
    """
    for path in checkpoints(directory):
        try:
            written = read_contents(path)
        except Damaged:
            continue  # nothing to lose
        difference = fingerprint_of(written).difference(fingerprint)
        if difference:
            raise GracecError(
                f"the directory has a checkpoint of another run: {difference}",
                where=str(path),
                fix="choose another directory or remove the old run",
            )
        if _step(path) > step and not damage_of(path):
            raise GracecError(
                f"the directory has a checkpoint of a later step than {step}",
                where=str(path),
                fix="resume from it, choose another directory or remove it",
            )


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run; a warning for each newer one that is damaged.

    Raises:
        GracecError: if that is of another format version.
    """
    for path in checkpoints(directory):
        damage = damage_of(path)
        if not damage:
            return path
        warnings.warn(
            f"{path}: the checkpoint is damaged and passed over: {damage}",
            GracecWarning,
            stacklevel=2,
        )
    return None


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, whole or not, the newest first."""
    named = (path for path in _entries(directory) if _NAME.fullmatch(path.name) and path.is_dir())
    found = (path for path in named if any(os.path.lexists(path / name) for name in _FILES))
    return sorted(found, key=lambda path: (-_step(path), path.name))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _entries(directory: Path) -> Iterator[Path]:
    return directory.iterdir() if directory.is_dir() else iter(())


def clean(directory: Path) -> list[str]:
    """Remove what interrupted saves left; a line for each thing that was there."""
    notes: list[str] = []
    for path in list(_entries(directory)):
        found = _LEFTOVER.fullmatch(path.name)
        if found and found[3] == "gracec":
            notes += directories.clear_leftovers(path.with_name(found[1]))
        elif found:
            _delete(path)
            notes.append(f"removed {path}, an old checkpoint that a killed process left")
    return notes


def foreign_to(path: Path) -> list[str]:
    """Names of what lies in a checkpoint and is none of its files."""
    return [name for name in directories.files_in(path) if name not in _FILES]


def _set_aside(target: Path, aside: Path) -> None:
    try:
        if aside.exists():  # of a save that was interrupted after its checkpoint was in place
            remove(aside)
        os.rename(target, aside)
    except OSError as error:
        raise GracecError(f"cannot be replaced: {error.strerror}", where=str(target)) from error
    directories.reached("set aside")


def _prune(directory: Path, newest: Path, keep: int) -> None:
    """Remove what is not among the `keep` newest of the run that has come to `newest`.

    What is later than `newest` is damaged, or `check_run` would have refused to write.
    """
    step = _step(newest)
    others = [path for path in checkpoints(directory) if path != newest]
    kept = [path for path in others if _step(path) < step and seems_whole(path)][: keep - 1]
    for path in others:
        if path in kept:
            continue
        try:
            remove(path)
        except OSError as error:
            warnings.warn(
                f"{path}: an old checkpoint cannot be removed: {error.strerror}",
                GracecWarning,
                stacklevel=3,
            )


def remove(path: Path) -> None:
    """Take a checkpoint out of the run in one step, then delete it."""
    hidden = path.with_name(f".{path.name}.removed")
    os.rename(path, hidden)
    directories.reached("unlisted")
    _delete(hidden)
    directories.reached("removed")


def _delete(hidden: Path) -> None:
    """Delete the files of a checkpoint that was taken out; what else is there is put back."""
    for name in _FILES:
        (hidden / name).unlink(missing_ok=True)
    try:
        hidden.rmdir()
    except OSError:
        found = _LEFTOVER.fullmatch(hidden.name)
        assert found is not None
        os.rename(hidden, hidden.with_name(found[1]))
