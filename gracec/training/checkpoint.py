"""Checkpoints of a training run, at the boundaries of optimizer steps, that resume bit for bit.

    RUN/step-00000042/tensors.safetensors   weights and scales, the best so far, the optimizer,
                                            the states of the random number generators
    RUN/step-00000042/checkpoint.json       everything else, with the sha256 of both

Nothing is pickled, so that reading a checkpoint runs no code. One process at a time writes into
RUN; in a distributed run that is the first rank.

A checkpoint is written under a temporary name, flushed to the disk and renamed
(`gracec.store.write_directory`); older ones go only after that. Whatever interrupts it, RUN holds
a whole checkpoint, if it held one before, which `latest_checkpoint` finds. What a killed process
leaves, `.step-*`, is ignored and goes with the next save. Where the checkpoint of the same step is
written again, the old one is called `step-00000042-replaced` meanwhile and counts until the new
one is in place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gracec._version import __version__
from gracec.errors import GracecError, GracecWarning
from gracec.store import file_sha256, write_directory

TENSORS, CONTENTS = "tensors.safetensors", "checkpoint.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 22
"""Elements that are read back from a device and hashed at a time."""
_NAME = re.compile(r"step-(\d{8,})(-replaced)?")
_TEMPORARY = re.compile(r"\.step-\d{8,}(-replaced)?\..+")
_NEXT_ONE = "remove it; the checkpoint before it is then the latest"


@dataclass(frozen=True)
class Fingerprint:
    """What must be the same for a run to go on with the same bits.

    Attributes:
        model: of the student as it was before training (`fingerprint_of_tensors`).
        teacher: of the teacher's tensors; empty without one.
        data: of the samples and their order.
        processor: of the processor's configuration (`fingerprint_of_json`).
        recipe: of the resolved recipe.
        threads: how many threads torch computes with; sums are split among them.
        torch: version of torch.
        gracec: version of gracec.
        device: what computes, as `describe_device` says it.
    """

    model: str
    teacher: str
    data: str
    processor: str
    recipe: str
    threads: int = field(default_factory=torch.get_num_threads)
    torch: str = field(default_factory=lambda: str(torch.__version__))
    gracec: str = __version__
    device: str = field(default_factory=lambda: describe_device(torch.device("cpu")))

    def difference(self, other: Fingerprint) -> str:
        """How `other`, of this process, differs first from this one of a checkpoint; or ""."""
        name = self._first_difference(other)
        if not name:
            return ""
        old, new = getattr(self, name), getattr(other, name)
        short = (_short(old), _short(new))
        then, now = short if short[0] != short[1] else (str(old), str(new))
        if name == "threads":
            return f"the checkpoint was written with {then} threads and this process has {now}"
        if name in ("torch", "gracec"):
            return f"the checkpoint was written by {name} {then} and this is {now}"
        if name == "device":
            return f"the checkpoint was written on {then} and this is {now}"
        return f"the {name} changed since the checkpoint was written (then {then}, now {now})"

    def remedy(self, other: Fingerprint) -> str:
        """What to do about `difference`."""
        name = self._first_difference(other)
        if name == "threads":
            return f"set OMP_NUM_THREADS={self.threads}: with another count the bits would differ"
        if name in ("torch", "gracec"):
            return f"install {name} {getattr(self, name)}, or start again in another directory"
        if name == "device":
            return "go on where it was written, or start again in another directory"
        return f"go on with the {name} it was written with, or start again in another directory"

    def _first_difference(self, other: Fingerprint) -> str:
        names = (item.name for item in fields(self))
        return next((n for n in names if getattr(self, n) != getattr(other, n)), "")


@dataclass(frozen=True, eq=False)
class RngState:
    """The states of the random number generators: of torch, Python and NumPy.

    Attributes:
        tensors: "torch", "cuda:0" and so on, "python", "numpy".
        scalars: what else Python and NumPy keep; JSON-able.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


class OptimizerState(NamedTuple):
    """The state of an optimizer, by the names of its parameters.

    Attributes:
        tensors: "state/<parameter>/<key>" and "groups/<number>/<option>"; not copied.
        scalars: groups with their parameters and options, and what a state has besides tensors.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


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
    contents = _contents(checkpoint, fingerprint)
    tensors = _all_tensors(checkpoint)
    check_run(directory, fingerprint, checkpoint.step)
    _clean(directory)
    target = directory / f"step-{checkpoint.step:08d}"
    aside = target.with_name(f"{target.name}-replaced")
    try:
        if target.is_dir():
            _set_aside(target, aside)
        write_directory(target, lambda path: _fill(path, tensors, contents))
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    _reached("written")
    _prune(directory, target, keep)
    return target


def check_run(directory: Path, fingerprint: Fingerprint, step: int = 0) -> None:
    """Refuse a directory in which a run that is at `step` would overwrite another one.

    Raises:
        GracecError: if a checkpoint there is of another run or whole and of a later step.
    """
    for path in _checkpoints(directory):
        try:
            written = _read_contents(path)
        except _Damaged:
            continue  # nothing to lose
        difference = _fingerprint(written).difference(fingerprint)
        if difference:
            raise GracecError(
                f"the directory has a checkpoint of another run: {difference}",
                where=str(path),
                fix="choose another directory or remove the old run",
            )
        if _step(path) > step and not _damage(path):
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
    for path in _checkpoints(directory):
        damage = _damage(path)
        if not damage:
            return path
        warnings.warn(
            f"{path}: the checkpoint is damaged and passed over: {damage}",
            GracecWarning,
            stacklevel=2,
        )
    return None


def load_checkpoint(path: Path, expected: Fingerprint) -> Checkpoint:
    """Read a checkpoint back, onto the CPU.

    Raises:
        GracecError: if it is damaged, of another format version or not of the run `expected`.
    """
    contents = _read_contents(path)
    written = _fingerprint(contents)
    difference = written.difference(expected)
    if difference:
        raise GracecError(difference, where=str(path), fix=written.remedy(expected))
    damage = _damage(path)
    if damage:
        raise _Damaged(path, damage)
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
            into[name].copy_(value)


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> OptimizerState:
    """The state of an optimizer by the names of its parameters; its tensors are not copied.

    Args:
        names: name -> parameter, for instance `dict(model.named_parameters())`.

    Raises:
        GracecError: if a parameter has no name, or a state is neither a tensor nor JSON-able.
    """
    name_of = _names_of(optimizer, names)
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        members = [name_of[id(parameter)] for parameter in group["params"]]
        options = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
        tensors |= {f"groups/{number}/{k}": v for k, v in _only_tensors(options).items()}
        groups.append({"parameters": members, "options": _only_scalars(options)})
        for parameter, name in zip(group["params"], members, strict=True):
            state = optimizer.state.get(parameter)
            if not state:
                continue
            held = _only_tensors(state)
            tensors |= {f"state/{name}/{key}": value for key, value in held.items()}
            on_host = sorted(key for key, value in held.items() if value.device.type == "cpu")
            states[name] = {
                "tensors": sorted(held),
                "on_host": on_host,
                "scalars": _only_scalars(state),
            }
    scalars = {"groups": groups, "state": states}
    _check_json(scalars, "optimizer")
    return OptimizerState(tensors, scalars)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], state: OptimizerState
) -> None:
    """Give an optimizer the state that `optimizer_state` took, whatever the order of parameters.

    Parameters that had no state have none afterwards. `Optimizer.load_state_dict` goes by numbers
    and casts states to the dtype of their parameter; this does neither.

    Raises:
        GracecError: if the parameters or their groups are not the same.
    """
    name_of = _names_of(optimizer, names)
    groups = _matching_groups(optimizer, name_of, state)
    for number, group in groups:
        saved = {**state.scalars["groups"][number]["options"]}
        prefix = f"groups/{number}/"
        for key, value in state.tensors.items():
            if key.startswith(prefix):
                saved[key.removeprefix(prefix)] = value
        for key in [key for key in group if key not in _NO_OPTIONS and key not in saved]:
            del group[key]
        for key, value in saved.items():
            group[key] = _like(value, group.get(key))
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            optimizer.state.pop(parameter, None)
            if name in state.scalars["state"]:
                optimizer.state[parameter] = _parameter_state(name, parameter, state)


def rng_state() -> RngState:
    """The states of the generators of torch, Python and NumPy, and of CUDA where it is in use.

    Raises:
        GracecError: if NumPy draws from another generator than its usual one.
    """
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    if legacy["bit_generator"] != "MT19937":
        raise GracecError(
            f"numpy.random draws from {legacy['bit_generator']}",
            fix="leave its global generator as it is, MT19937",
        )
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype("int64")),
    }
    if torch.cuda.is_initialized():  # asking would otherwise make a context on every device
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda:{number}"] = state
    scalars = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }
    return RngState(tensors, scalars)


def set_rng_state(state: RngState) -> None:
    """Put the generators into a state that `rng_state` took.

    Raises:
        GracecError: if it has a state for a CUDA device that is not here.
    """
    devices = sorted(name for name in state.tensors if name.startswith("cuda:"))
    here = torch.cuda.device_count()
    if len(devices) > here:
        raise GracecError(
            f"the checkpoint has states of {len(devices)} CUDA devices and {here} are here",
            fix="resume on as many devices",
        )
    python, legacy = state.scalars["python"], state.scalars["numpy"]
    torch.set_rng_state(state.tensors["torch"])
    words = tuple(state.tensors["python"].tolist())
    random.setstate((python["version"], words, python["gauss"]))
    key = state.tensors["numpy"].numpy().astype("uint32")
    numpy.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": legacy["pos"]},
            "has_gauss": legacy["has_gauss"],
            "gauss": legacy["gauss"],
        }
    )
    for name in devices:
        torch.cuda.set_rng_state(state.tensors[name], name)


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, whatever the order, device or memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _plain(name, tensors[name])
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update((json.dumps(header) + "\n").encode())
        for chunk in tensor.reshape(-1).split(_CHUNK):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of_json(value: Any) -> str:
    """sha256 over a JSON-able value, whatever the order of its keys.

    Raises:
        GracecError: if JSON would not give it back as it is.
    """
    _check_json(value, "value")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_device(device: torch.device) -> str:
    """A device in words that are equal where the same kernels run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _reached(point: str) -> None:
    """A named point of the sequence; tests interrupt the process here."""


# The optimizer

_NO_OPTIONS = ("params", "param_names")
"""Keys of a parameter group that are no options; their order is that of the live optimizer."""


def _names_of(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[int, str]:
    """id of each parameter of the optimizer -> its first name."""
    first: dict[int, str] = {}
    for name in sorted(names):
        first.setdefault(id(names[name]), name)
    found: dict[int, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in first:
                raise GracecError(
                    f"a parameter of shape {list(parameter.shape)} has no name",
                    where=f"group {number} of the optimizer",
                    fix="give the names of all that is trained",
                )
            found[id(parameter)] = first[id(parameter)]
    return found


def _matching_groups(
    optimizer: torch.optim.Optimizer, name_of: Mapping[int, str], state: OptimizerState
) -> list[tuple[int, dict[str, Any]]]:
    """The number of the saved group and the live group, of the same parameters."""
    number_of = {
        frozenset(group["parameters"]): number
        for number, group in enumerate(state.scalars["groups"])
    }
    saved, here = frozenset[str]().union(*number_of), set(name_of.values())
    for name in sorted(saved ^ here):
        has = "the checkpoint" if name in saved else "this optimizer"
        raise _other_optimizer(f"only {has} has {name}")
    found: list[tuple[int, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        members = frozenset(name_of[id(parameter)] for parameter in group["params"])
        if members not in number_of:
            raise _other_optimizer(f"{min(members)} was in a group of other parameters")
        found.append((number_of[members], group))
    return found


def _other_optimizer(what: str) -> GracecError:
    return GracecError(
        what, where="optimizer", fix="resume with the same parameters in the same groups"
    )


def _only_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def _only_scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is no tensor; a tuple, such as the betas of Adam, as a list."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if not isinstance(value, Tensor)
    }


def _like(value: Any, live: Any) -> Any:
    """A saved option in the type of the live one: in its place, if that is a tensor."""
    if isinstance(value, Tensor):
        if isinstance(live, Tensor) and (live.shape, live.dtype) == (value.shape, value.dtype):
            return live.copy_(value)
        return value.clone()
    return tuple(value) if isinstance(live, tuple) else value


def _parameter_state(name: str, parameter: Tensor, state: OptimizerState) -> dict[str, Any]:
    saved = state.scalars["state"][name]
    result = dict(saved["scalars"])
    for key in saved["tensors"]:
        value = state.tensors[f"state/{name}/{key}"]
        device = torch.device("cpu") if key in saved["on_host"] else parameter.device
        if value.shape == parameter.shape:  # with the strides that the optimizer would give it
            copy = torch.empty_like(parameter, dtype=value.dtype, device=device)
            copy.requires_grad_(False)
        else:
            copy = torch.empty(value.shape, dtype=value.dtype, device=device)
        result[key] = copy.copy_(value)
    return result


# What is in a checkpoint


def _contents(checkpoint: Checkpoint, fingerprint: Fingerprint) -> dict[str, Any]:
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
        _check_json(value, name)
    return contents


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would not give back as it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise GracecError(f"the key {key!r} is no text", where=where, fix="use strings")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_json(item, f"{where}[{number}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise GracecError(f"{value} is not a finite number", where=where, fix="use None")
    elif value is not None and not isinstance(value, str | int):
        raise GracecError(
            f"{type(value).__name__} is not a JSON value",
            where=where,
            fix="use dictionaries, lists, text, numbers, True, False or None",
        )


def _all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
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
            tensor = _plain(name, values[name]).cpu().contiguous()
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            seen.add(tensor.untyped_storage().data_ptr())
            tensors[f"{part}/{name}"] = tensor
    return tensors


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Without its graph; refused if its values are not a block of memory."""
    plain = tensor.detach()
    if type(plain) is not Tensor or plain.is_meta or plain.layout != torch.strided:
        kind = "meta" if plain.is_meta else type(plain).__name__
        raise GracecError(
            f"{name} is no ordinary dense tensor ({kind}, {plain.layout})",
            fix="gather it first",
        )
    return plain


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _fill(path: Path, tensors: dict[str, Tensor], contents: dict[str, Any]) -> None:
    try:
        save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    except KeyError as error:
        raise GracecError(f"safetensors cannot hold {error.args[0]}", where=TENSORS) from error
    (path / TENSORS).chmod(0o644)  # safetensors lets nobody but the owner read it
    _reached("tensors written")
    sealed = {
        "format_version": FORMAT_VERSION,
        "tensors_sha256": file_sha256(path / TENSORS),
        "contents_sha256": fingerprint_of_json(contents),
        "contents": contents,
    }
    text = json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False)
    (path / CONTENTS).write_text(text + "\n", encoding="utf-8")


def _read_sealed(path: Path) -> dict[str, Any]:
    """checkpoint.json, of this format version and as it was written.

    Raises:
        GracecError: if it is not.
    """
    try:
        sealed = json.loads((path / CONTENTS).read_text(encoding="utf-8"))
    except OSError as error:
        raise _Damaged(path, f"{CONTENTS} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _Damaged(path, f"{CONTENTS} is not readable as JSON: {error}") from error
    found = sealed.get("format_version") if isinstance(sealed, dict) else None
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise GracecError(
            f"format version {found}, this gracec reads {FORMAT_VERSION}",
            where=str(path),
            fix="resume with the gracec that wrote it",
        )
    try:
        intact = fingerprint_of_json(sealed["contents"]) == sealed["contents_sha256"]
        intact = intact and isinstance(sealed["tensors_sha256"], str) and found is not None
    except (GracecError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _Damaged(path, f"{CONTENTS} is not what was written")
    assert isinstance(sealed, dict)
    return sealed


class _Damaged(GracecError):
    """A checkpoint is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(what, where=str(path), fix=_NEXT_ONE)


def _read_contents(path: Path) -> dict[str, Any]:
    contents: dict[str, Any] = _read_sealed(path)["contents"]
    return contents


def _fingerprint(contents: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(**contents["fingerprint"])


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        promised = _read_sealed(path)["tensors_sha256"]
        if file_sha256(path / TENSORS) != promised:
            return f"{TENSORS} is not what was written (sha256 differs)"
        with safe_open(path / TENSORS, framework="pt"):
            return ""
    except _Damaged as error:
        return error.what
    except OSError as error:
        return f"{TENSORS} cannot be read: {error.strerror or error}"
    except SafetensorError as error:
        return f"{TENSORS} cannot be read: {error}"


def _short(value: str | int) -> str:
    """The first twelve characters of a digest, anything else whole."""
    text = str(value) or "none"
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


# The directory of a run


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, whole or not, the newest first."""
    found = (path for path in _entries(directory) if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: (-_step(path), path.name))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _entries(directory: Path) -> Iterator[Path]:
    return directory.iterdir() if directory.is_dir() else iter(())


def _clean(directory: Path) -> None:
    """Remove what an interrupted save left."""
    for path in list(_entries(directory)):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(target: Path, aside: Path) -> None:
    try:
        if aside.exists():  # of a save that was interrupted after its checkpoint was in place
            _remove(aside)
        os.rename(target, aside)
    except OSError as error:
        raise GracecError(f"cannot be replaced: {error.strerror}", where=str(target)) from error
    _reached("set aside")


def _prune(directory: Path, newest: Path, keep: int) -> None:
    """Remove what is not among the `keep` newest of the run that has come to `newest`.

    What is later than `newest` is damaged, or `check_run` would have refused to write.
    """
    step = _step(newest)
    others = [path for path in _checkpoints(directory) if path != newest]
    kept = [path for path in others if _step(path) < step and _seems_whole(path)][: keep - 1]
    for path in others:
        if path in kept:
            continue
        try:
            _remove(path)
        except OSError as error:
            warnings.warn(
                f"{path}: an old checkpoint cannot be removed: {error.strerror}",
                GracecWarning,
                stacklevel=3,
            )


def _seems_whole(path: Path) -> bool:
    """Whether it is worth keeping. Its tensors are not read: that would be done at every save."""
    try:
        _read_sealed(path)
        with safe_open(path / TENSORS, framework="pt"):  # compares header and length of the file
            return True
    except (GracecError, OSError, SafetensorError):
        return False


def _remove(path: Path) -> None:
    """Take a checkpoint out of the run in one step, then delete it."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, hidden)  # takes the place of the empty directory
    _reached("unlisted")
    shutil.rmtree(hidden, ignore_errors=True)
    _reached("removed")
