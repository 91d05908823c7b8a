"""What must be the same for a run to go on with the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from gracec._version import __version__
from gracec.errors import GracecError
from gracec.json_files import JsonModel

CHUNK = 1 << 22
"""Elements that are read back from a device and hashed at a time."""


@dataclass(frozen=True)
class Fingerprint:
    """What must be the same for a run to go on with the same bits.

    Attributes:
        model: of the student as it was before training (`fingerprint_of_tensors`).
        teacher: of the teacher's tensors; empty without one.
        data: of the samples and their order.
        processor: of the processor's configuration (`fingerprint_of_json`).
        recipe: of the resolved recipe.
        calibration: of the codes that a calibration found, to start from or to compare with; empty
            without one.
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
    calibration: str = ""
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


class FingerprintFields(JsonModel):
    """A `Fingerprint` in a file."""

    model: str
    teacher: str
    data: str
    processor: str
    recipe: str
    calibration: str = ""
    threads: int
    torch: str
    gracec: str
    device: str


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, whatever the order, device or memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = plain(name, tensors[name])
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update((json.dumps(header) + "\n").encode())
        for chunk in tensor.reshape(-1).split(CHUNK):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of_json(value: Any) -> str:
    """sha256 over a JSON-able value, whatever the order of its keys.

    Raises:
        GracecError: if JSON would not give it back as it is.
    """
    check_json(value, "value")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_device(device: torch.device) -> str:
    """A device in words that are equal where the same kernels run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def check_json(value: Any, where: str) -> None:
    """Refuse what JSON would not give back as it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise GracecError(f"the key {key!r} is no text", where=where, fix="use strings")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_json(item, f"{where}[{number}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise GracecError(f"{value} is not a finite number", where=where, fix="use None")
    elif value is not None and not isinstance(value, str | int):
        raise GracecError(
            f"{type(value).__name__} is not a JSON value",
            where=where,
            fix="use dictionaries, lists, text, numbers, True, False or None",
        )


def plain(name: str, tensor: Tensor) -> Tensor:
    """Without its graph; refused if its values are not a block of memory."""
    plain = tensor.detach()
    if type(plain) is not Tensor or plain.is_meta or plain.layout != torch.strided:
        kind = "meta" if plain.is_meta else type(plain).__name__
        raise GracecError(
            f"{name} is no ordinary dense tensor ({kind}, {plain.layout})",
            fix="gather it first",
        )
    return plain


def _short(value: str | int) -> str:
    """The first twelve characters of a digest, anything else whole."""
    text = str(value) or "none"
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
