"""One checkpoint: what is in it, how it is written and sealed with hashes, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gracec import directories
from gracec.errors import GracecError
from gracec.file_hashes import file_sha256
from gracec.json_files import JsonModel, check_fields, read_json
from gracec.training.checkpoints.fingerprint import (
    Fingerprint,
    FingerprintFields,
    check_json,
    fingerprint_of_json,
    plain,
)
from gracec.training.checkpoints.optimizer import OptimizerState
from gracec.training.checkpoints.rng import RngState
from gracec.training.shards import write

TENSORS, CONTENTS = "tensors.safetensors", "checkpoint.json"


FORMAT_VERSION = 1


class _Rng(JsonModel):
    python: dict[str, Any]
    numpy: dict[str, Any]


class _Optimizer(JsonModel):
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]


class _Contents(JsonModel):
    """What a checkpoint holds beside tensors; see `Checkpoint`."""

    step: NonNegativeInt
    epoch: NonNegativeInt
    sample: NonNegativeInt
    skipped_in_a_row: NonNegativeInt
    skipped_total: NonNegativeInt
    best_score: float | None
    controller: dict[str, Any]
    extra: dict[str, Any]
    optimizer: _Optimizer
    rng: _Rng
    fingerprint: FingerprintFields


class _Sealed(JsonModel):
    """What `checkpoint.json` holds: the contents, and the hashes of both files."""

    format_version: int
    tensors_sha256: str
    contents_sha256: str
    contents: dict[str, Any]


_NEXT_ONE = "remove it; the checkpoint before it is then the latest"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a run needs to go on.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch that the next step belongs to.
        sample: position of the next sample in the order of this epoch.
        tensors: trainable weights and scales by name.
        best: the best of them so far; may be empty.
        best_score: the score of `best`.
        optimizer: what `optimizer_state` returns.
        controller: what `Controller.state_dict` returns.
        rng: what `rng_state` returns.
        skipped_in_a_row: optimizer steps skipped since the last that was not.
        skipped_total: optimizer steps skipped in the whole run.
        extra: anything else that is JSON-able.
    """

    step: int
    epoch: int
    sample: int
    tensors: Mapping[str, Tensor]
    optimizer: OptimizerState
    controller: Mapping[str, Any]
    rng: RngState
    best: Mapping[str, Tensor] = field(default_factory=dict)
    best_score: float | None = None
    skipped_in_a_row: int = 0
    skipped_total: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


_COUNTS = ("step", "epoch", "sample", "skipped_in_a_row", "skipped_total")


def load_checkpoint(path: Path, expected: Fingerprint) -> Checkpoint:
    """Read a checkpoint back, onto the CPU.

    Raises:
        GracecError: if it is damaged, of another format version or not of the run `expected`.
    """
    contents = read_contents(path)
    written = fingerprint_of(contents)
    difference = written.difference(expected)
    if difference:
        raise GracecError(difference, where=str(path), fix=written.remedy(expected))
    damage = damage_of(path)
    if damage:
        raise Damaged(path, damage)
    with safe_open(path / TENSORS, framework="pt") as file:
        # A copy lies where torch puts its tensors; one that is read begins anywhere, and where a
        # tensor begins can change the order in which a kernel sums.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    return Checkpoint(
        tensors=_part(tensors, "tensors"),
        best=_part(tensors, "best"),
        optimizer=OptimizerState(_part(tensors, "optimizer"), contents["optimizer"]),
        rng=RngState(_part(tensors, "rng"), contents["rng"]),
        controller=contents["controller"],
        best_score=contents["best_score"],
        extra=contents["extra"],
        **{name: contents[name] for name in _COUNTS},
    )


def load_tensors(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy saved weights into the live ones in place, without a cast.

    Raises:
        GracecError: if names, shapes or dtypes are not the same.
    """
    for name in sorted(saved.keys() ^ into.keys()):
        has = "the checkpoint" if name in saved else "the model"
        raise GracecError(f"only {has} has {name}", fix="resume with the model that was trained")
    for name, value in saved.items():
        then, now = (f"{t.dtype} {list(t.shape)}" for t in (value, into[name]))
        if then != now:
            raise GracecError(
                f"{name} is {now} in the model and {then} in the checkpoint",
                fix="resume with the model that was trained",
            )
    with torch.no_grad():
        for name, value in saved.items():
            write(into[name], value)


def contents_of(checkpoint: Checkpoint, fingerprint: Fingerprint) -> dict[str, Any]:
    """All but the tensors, checked to come back from JSON as it is."""
    for name in _COUNTS:
        count = getattr(checkpoint, name)
        if type(count) is not int or count < 0:
            raise GracecError(f"{count!r} is not a count", where=name)
    contents = {
        **{name: getattr(checkpoint, name) for name in _COUNTS},
        "best_score": checkpoint.best_score,
        "controller": dict(checkpoint.controller),
        "extra": dict(checkpoint.extra),
        "optimizer": dict(checkpoint.optimizer.scalars),
        "rng": dict(checkpoint.rng.scalars),
        "fingerprint": {item.name: getattr(fingerprint, item.name) for item in fields(fingerprint)},
    }
    for name, value in contents.items():
        check_json(value, name)
    return contents


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor, on the CPU, contiguous and with memory of its own, as safetensors wants it."""
    parts = {
        "best": checkpoint.best,
        "optimizer": checkpoint.optimizer.tensors,
        "rng": checkpoint.rng.tensors,
        "tensors": checkpoint.tensors,
    }
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for part, values in parts.items():
        for name in sorted(values):
            tensor = plain(name, values[name]).cpu().contiguous()
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            seen.add(tensor.untyped_storage().data_ptr())
            tensors[f"{part}/{name}"] = tensor
    return tensors


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fill(path: Path, tensors: dict[str, Tensor], contents: dict[str, Any]) -> None:
    try:
        save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    except KeyError as error:
        raise GracecError(f"safetensors cannot hold {error.args[0]}", where=TENSORS) from error
    (path / TENSORS).chmod(0o644)  # safetensors lets nobody but the owner read it
    directories.reached("tensors written")
    sealed = {
        "format_version": FORMAT_VERSION,
        "tensors_sha256": file_sha256(path / TENSORS),
        "contents_sha256": fingerprint_of_json(contents),
        "contents": contents,
    }
    text = json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False)
    (path / CONTENTS).write_text(text + "\n", encoding="utf-8")


def _read_sealed(path: Path) -> _Sealed:
    """checkpoint.json, of this format version and as it was written.

    Raises:
        GracecError: if it is not.
    """
    try:
        fields = read_json(path / CONTENTS)
    except GracecError as error:
        raise Damaged(path, f"{CONTENTS}: {error.what}") from error
    found = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise GracecError(
            f"format version {found}, this gracec reads {FORMAT_VERSION}",
            where=str(path),
            fix="resume with the gracec that wrote it",
        )
    try:
        sealed = check_fields(_Sealed, fields, where=CONTENTS)
        if fingerprint_of_json(sealed.contents) != sealed.contents_sha256:
            raise Damaged(path, f"{CONTENTS} is not what was written")
        check_fields(_Contents, sealed.contents, where=f"{CONTENTS}: contents")
    except Damaged:
        raise
    except GracecError as error:
        raise Damaged(path, str(error)) from error
    return sealed


class Damaged(GracecError):
    """A checkpoint is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(what, where=str(path), fix=_NEXT_ONE)


def read_contents(path: Path) -> dict[str, Any]:
    return _read_sealed(path).contents


def fingerprint_of(contents: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(**contents["fingerprint"])


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        promised = _read_sealed(path).tensors_sha256
        with (path / TENSORS).open("rb"):
            pass  # whether it is there and can be read, with the reason of the system
        if file_sha256(path / TENSORS) != promised:
            return f"{TENSORS} is not what was written (sha256 differs)"
        with safe_open(path / TENSORS, framework="pt"):
            return ""
    except Damaged as error:
        return error.what
    except OSError as error:
        return f"{TENSORS} cannot be read: {error.strerror or error}"
    except SafetensorError as error:
        return f"{TENSORS} cannot be read: {error}"


def seems_whole(path: Path) -> bool:
    """Whether it is worth keeping. Its tensors are not read: that would be done at every save."""
    try:
        _read_sealed(path)
        with safe_open(path / TENSORS, framework="pt"):  # compares header and length of the file
            return True
    except (GracecError, OSError, SafetensorError):
        return False
