"""The canonical artifact: integer codes and scales, everything else as it is, and a manifest.

    DIR/gracec/gracec.safetensors   <fqn>.codes   uint8 [N, K / 2], two codes a byte, low nibble
                                                  first (int8 [N, K] for 8-bit codes, odd widths)
                                    <fqn>.scales  bfloat16 [N, K / group_size]
                                    <fqn>.input_scales, <fqn>.input_zero_points
                                                  bfloat16 and int32, of the input of the linear
                                                  where the recipe quantizes activations
                                    <fqn>         every other parameter and buffer, those of
                                                  adapters among them: <linear>.lora_A.weight
    DIR/gracec.json                 the manifest: format version, spec of each weight and of each
                                    input, scaling of each adapter, sha256, report
    DIR/config.json ...             the Hugging Face configuration and processor

The tensors lie in a folder of their own, because some runtimes load every safetensors file that
they find at the top level of a model directory.

A directory is written under a temporary name beside its own, flushed to the disk, and then takes
the place of the old one in a single step. Whatever interrupts that, DIR is the whole old artifact
or the whole new one. A process that is killed leaves its temporary directory, `.DIR.*`, behind.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gracec.errors import GracecError
from gracec.quant import QuantSpec
from gracec.quant.frozen import FrozenActivation, FrozenWeight
from gracec.quant.observers import ActivationSpec

TENSORS, MANIFEST = "gracec/gracec.safetensors", "gracec.json"
FORMAT_VERSION, WITH_ACTIVATIONS, WITH_ADAPTERS = 2, 3, 4
"""Of an artifact: each knows what those before it do, and an older gracec refuses it."""
_RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Store:
    """What an artifact holds.

    Attributes:
        weights: FQN -> codes and scales.
        others: FQN -> every parameter and buffer that is not quantized.
        manifest: JSON-able; "recipe" and "report" among its keys.
        adapters: linear -> scaling of the LoRA beside it, whose tensors are in `others`.
    """

    weights: Mapping[str, FrozenWeight]
    others: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    adapters: Mapping[str, float] = field(default_factory=dict)


class StoredWeights(Mapping[str, FrozenWeight]):
    """FQN -> codes and scales, read from the file at each access and not kept in memory."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, QuantSpec],
        activations: Mapping[str, ActivationSpec],
    ) -> None:
        self._path, self._specs, self._activations = path, specs, activations

    def __getitem__(self, fqn: str) -> FrozenWeight:
        spec, activation = self._specs[fqn], None
        try:
            with safe_open(self._path, framework="pt") as file:
                codes, scales = file.get_tensor(f"{fqn}.codes"), file.get_tensor(f"{fqn}.scales")
                if fqn in self._activations:
                    activation = FrozenActivation(
                        file.get_tensor(f"{fqn}.input_scales").to(torch.float32),
                        file.get_tensor(f"{fqn}.input_zero_points"),
                        self._activations[fqn],
                    )
        except (OSError, SafetensorError) as error:
            raise GracecError(f"{fqn} cannot be read: {error}", where=str(self._path)) from error
        return FrozenWeight(codes, scales.to(torch.float32), spec, activation)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def is_artifact(directory: Path) -> bool:
    """Whether a directory was written by gracec."""
    return (directory / MANIFEST).is_file()


def check_target(directory: Path, overwrite: bool = False) -> None:
    """Refuse to write over anything but, if `overwrite`, another artifact.

    Raises:
        GracecError: if the directory exists and may not be replaced.
    """
    if not directory.exists():
        return
    if not overwrite:
        raise GracecError("the output directory exists", where=str(directory), fix="choose another")
    if not is_artifact(directory):
        raise GracecError(
            "only a gracec artifact is overwritten, and this is none",
            where=str(directory),
            fix="choose another directory",
        )


def write_directory(
    directory: Path, fill: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Fill a directory under a temporary name beside it, then put it in place in a single step.

    Args:
        overwrite: replace an artifact that is there.

    Raises:
        GracecError: if the directory may not be written, or the disk does not take it.
    """
    directory = directory.absolute()
    check_target(directory, overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise _cannot_write(directory, error) from error
    try:
        reached("created")
        fill(temporary)
        reached("filled")
        os.chmod(temporary, 0o755)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        reached("flushed")
        _put_in_place(temporary, directory)
        reached("in place")
        _flush(directory.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(directory, error) from error
    finally:  # what is left here is a part of the new artifact, or the whole old one
        shutil.rmtree(temporary, ignore_errors=True)
    reached("cleaned")


def reached(point: str) -> None:
    """A named point of the sequence; tests interrupt the process here."""


def _put_in_place(temporary: Path, directory: Path) -> None:
    """Rename, or exchange with the artifact that is there, which `temporary` then names."""
    if not directory.exists():
        os.rename(temporary, directory)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD; both paths are absolute
    names = os.fsencode(temporary), os.fsencode(directory)
    if exchange is None:
        failed = errno.ENOSYS
    else:
        done = exchange(here, names[0], here, names[1], _RENAME_EXCHANGE) == 0
        failed = 0 if done else ctypes.get_errno()
    if failed in (errno.ENOSYS, errno.EINVAL):
        raise OSError(failed, "this system cannot exchange two directories in one step; remove it")
    if failed:
        raise OSError(failed, os.strerror(failed))


def _flush(path: Path) -> None:
    """Have the file system write a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(directory: Path, error: Exception) -> GracecError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return GracecError(
        f"cannot be written: {reason}", where=str(directory), fix="nothing was changed there"
    )


def write_store(store: Store, directory: Path) -> None:
    """Write tensors and manifest into an existing directory; equal input gives equal bytes."""
    tensors: dict[str, Tensor] = {}
    activations: dict[str, dict[str, Any]] = {}
    for fqn, weight in store.weights.items():
        tensors[f"{fqn}.codes"] = weight.stored
        exact = torch.bfloat16 if weight.spec.scale_grid == "bf16" else torch.float32
        tensors[f"{fqn}.scales"] = weight.scales.to(exact)
        if weight.activation is not None:
            activations[fqn] = weight.activation.spec.to_dict()
            tensors[f"{fqn}.input_scales"] = weight.activation.scales.to(torch.bfloat16)
            tensors[f"{fqn}.input_zero_points"] = weight.activation.zero_points
    tensors.update({fqn: tensor.detach() for fqn, tensor in store.others.items()})
    # Linears that share an input share its tensors, which a file may not.
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    tensors |= {name: t.clone() for name, t in tensors.items() if name.endswith("_zero_points")}
    path = directory / TENSORS
    path.parent.mkdir()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody but the owner read it
    version = WITH_ACTIVATIONS if activations else FORMAT_VERSION
    manifest = {
        "format_version": WITH_ADAPTERS if store.adapters else version,
        "sha256": file_sha256(path),
        "weights": {fqn: weight.spec.to_dict() for fqn, weight in sorted(store.weights.items())},
        **({"activations": dict(sorted(activations.items()))} if activations else {}),
        **({"adapters": dict(store.adapters)} if store.adapters else {}),
        **store.manifest,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact, without its tensors.

    Raises:
        GracecError: if it is missing, unreadable or of another format version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise GracecError("not a gracec artifact", where=str(directory), fix=f"{MANIFEST} missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GracecError(f"not readable as JSON: {error}", where=str(path)) from error
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found not in (FORMAT_VERSION, WITH_ACTIVATIONS, WITH_ADAPTERS):
        raise GracecError(
            f"format version {found}, this gracec reads {FORMAT_VERSION} to {WITH_ADAPTERS}",
            where=str(path),
            fix="compile the model again",
        )
    assert isinstance(manifest, dict)
    return manifest


def read_store(directory: Path) -> Store:
    """Read an artifact back and check it against its manifest.

    Raises:
        GracecError: if a file is missing, unreadable, of another format version or not what was
            written.
    """
    manifest = read_manifest(directory)
    tensors_path = directory / TENSORS
    if not tensors_path.is_file():
        raise GracecError("missing", where=str(tensors_path), fix="compile the model again")
    if file_sha256(tensors_path) != manifest["sha256"]:
        raise GracecError(
            "the file is not the one that was written (sha256 differs)",
            where=str(tensors_path),
            fix="copy it again or compile the model again",
        )
    specs = {fqn: QuantSpec(**fields) for fqn, fields in manifest["weights"].items()}
    activations = {
        fqn: ActivationSpec(**fields) for fqn, fields in manifest.get("activations", {}).items()
    }
    quantized = {f"{fqn}.{suffix}" for fqn in specs for suffix in ("codes", "scales")}
    inputs = ("input_scales", "input_zero_points")
    quantized |= {f"{fqn}.{suffix}" for fqn in activations for suffix in inputs}
    try:
        with safe_open(tensors_path, framework="pt") as file:
            names = set(file.keys())
            others = {name: file.get_tensor(name) for name in sorted(names - quantized)}
    except SafetensorError as error:
        raise GracecError(f"not readable: {error}", where=str(tensors_path)) from error
    missing = sorted(quantized - names)
    if missing:
        raise GracecError(f"{missing[0]} is missing", where=str(tensors_path))
    adapters = manifest.get("adapters", {})
    return Store(StoredWeights(tensors_path, specs, activations), others, manifest, adapters)


def file_sha256(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
