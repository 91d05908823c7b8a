"""The canonical artifact: integer codes and scales, everything else as it is, and a manifest.

    DIR/gracec.safetensors   <fqn>.codes   uint8 [N, K / 2], two codes a byte, low nibble first
                                           (int8 [N, K] for 8-bit codes)
                             <fqn>.scales  bfloat16 [N, K / group_size]
                             <fqn>         every other parameter and buffer
    DIR/gracec.json          the manifest: format version, spec of each weight, sha256, report
    DIR/config.json ...      the Hugging Face configuration and processor

Nothing half-written is left: the directory is written under a temporary name and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gracec.errors import GracecError
from gracec.passes.freeze import FrozenWeight
from gracec.quant import QuantSpec

TENSORS, MANIFEST = "gracec.safetensors", "gracec.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Store:
    """What an artifact holds.

    Attributes:
        weights: FQN -> codes and scales.
        others: FQN -> every parameter and buffer that is not quantized.
        manifest: JSON-able; "recipe" and "report" among its keys.
    """

    weights: Mapping[str, FrozenWeight]
    others: Mapping[str, Tensor]
    manifest: Mapping[str, Any]


def is_artifact(directory: Path) -> bool:
    """Whether a directory was written by gracec."""
    return (directory / MANIFEST).is_file()


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes [N, K] in [-8, 7] -> uint8 [N, K / 2], low nibble first, two's complement."""
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [N, K / 2] -> int8 [N, K]."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def write_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Fill a directory under a temporary name beside it, then rename it into place.

    Raises:
        GracecError: if the directory exists already.
    """
    directory = directory.absolute()
    if directory.exists():
        raise GracecError("the output directory exists", where=str(directory), fix="choose another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        fill(temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_store(store: Store, directory: Path) -> None:
    """Write tensors and manifest into an existing directory."""
    tensors: dict[str, Tensor] = {}
    for fqn, weight in store.weights.items():
        small = weight.spec.storage_bits == 4
        tensors[f"{fqn}.codes"] = pack_nibbles(weight.codes) if small else weight.codes
        exact = torch.bfloat16 if weight.spec.scale_grid == "bf16" else torch.float32
        tensors[f"{fqn}.scales"] = weight.scales.to(exact)
    tensors.update({fqn: tensor.detach() for fqn, tensor in store.others.items()})
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
    manifest = {
        "format_version": FORMAT_VERSION,
        "sha256": _sha256(directory / TENSORS),
        "weights": {fqn: weight.spec.to_dict() for fqn, weight in sorted(store.weights.items())},
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
    if found != FORMAT_VERSION:
        raise GracecError(
            f"format version {found}, this gracec reads {FORMAT_VERSION}",
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
    if _sha256(tensors_path) != manifest["sha256"]:
        raise GracecError(
            "the file is not the one that was written (sha256 differs)",
            where=str(tensors_path),
            fix="copy it again or compile the model again",
        )
    try:
        with safe_open(tensors_path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise GracecError(f"not readable: {error}", where=str(tensors_path)) from error
    weights = {}
    for fqn, fields in manifest["weights"].items():
        spec = QuantSpec(**fields)
        codes = tensors.pop(f"{fqn}.codes")
        codes = unpack_nibbles(codes) if spec.storage_bits == 4 else codes
        scales = tensors.pop(f"{fqn}.scales").to(torch.float32)
        weights[fqn] = FrozenWeight(codes, scales, spec)
    return Store(weights, tensors, manifest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
