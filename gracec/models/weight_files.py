"""The weight files of a Hugging Face directory: which they are, whether they are whole and finite.

Only the headers are read, or one tensor at a time, so that a checkpoint of any size can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gracec.errors import GracecError

# In the order in which transformers looks for them.
CANDIDATES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LFS_POINTER = b"version https://git-lfs"
AGAIN = "copy or download it again"


def checkpoint_files(directory: Path) -> list[Path]:
    """The weight files of a model directory, each one there and readable to its end.

    Raises:
        GracecError: naming the first file that is missing, cut short or no checkpoint.
    """
    name = next((name for name in CANDIDATES if (directory / name).is_file()), None)
    if name is None:
        raise GracecError(
            f"no weights: neither {CANDIDATES[0]} nor {CANDIDATES[2]} nor an index of shards",
            where=str(directory),
            fix="copy the weight files into this directory",
        )
    path = directory / name
    promised: dict[str, set[str]] = {name: set()}
    if path.suffix == ".json":
        promised = _shards(path)
    files = [directory / shard for shard in sorted(promised)]
    for file in files:
        if not file.is_file():
            raise GracecError(
                f"this shard is missing, {path.name} lists {len(files)}", where=str(file), fix=AGAIN
            )
        if file.suffix == ".safetensors":
            lacking = sorted(promised[file.name] - set(_names(file)))
            if lacking:
                raise GracecError(
                    f"{lacking[0]} is listed in {path.name} but not in this shard",
                    where=str(file),
                    fix=AGAIN,
                )
    return files


def checkpoint_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor, one in memory at a time where the format allows it.

    Raises:
        GracecError: if a file cannot be read.
    """
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)
            continue
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise GracecError(
                "truncated or no PyTorch checkpoint", where=str(file), fix=AGAIN
            ) from error
        yield from ((name, value) for name, value in loaded.items() if isinstance(value, Tensor))


def stored_dtype(files: Iterable[Path]) -> torch.dtype | None:
    """The dtype of the first floating-point tensor of a checkpoint."""
    return next((t.dtype for _, t in checkpoint_tensors(files) if t.is_floating_point()), None)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name of the first tensor that holds NaN or infinity, or an empty string."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            # Both extremes in one pass and without a mask the size of the tensor.
            extremes = tensor if tensor.element_size() > 1 else tensor.float()  # float8
            low, high = torch.aminmax(extremes.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return name
    return ""


def _shards(index: Path) -> dict[str, set[str]]:
    """Shard -> the tensors that the index says are in it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GracecError("not an index of shards", where=str(index), fix=AGAIN) from error
    shards: dict[str, set[str]] = {}
    for tensor, shard in items:
        shards.setdefault(str(shard), set()).add(str(tensor))
    if not shards:
        raise GracecError("the index lists no weights", where=str(index), fix=AGAIN)
    return shards


def _names(file: Path) -> list[str]:
    try:
        # The header is checked against the length of the file.
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        with file.open("rb") as start:
            if start.read(len(LFS_POINTER)) == LFS_POINTER:
                raise GracecError(
                    "a Git LFS pointer, not the file itself", where=str(file), fix="git lfs pull"
                ) from error
        detail = str(error).rpartition(": ")[2]
        raise GracecError(
            f"truncated or no safetensors file ({detail})", where=str(file), fix=AGAIN
        ) from error
