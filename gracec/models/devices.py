"""Devices and dtypes as a user names them, held to what this machine has."""

from __future__ import annotations

from typing import Any

import torch

from gracec.errors import GracecError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_named(device: str | torch.device | None) -> torch.device | None:
    """A device that can be computed on; None is none.

    Raises:
        GracecError: if there is no such device on this machine.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise GracecError(
            f"unknown device {str(device)!r}", where="device", fix="use cpu, or cuda, or cuda:1"
        ) from error
    if found.type == "meta":
        raise GracecError("nothing can be computed on meta", where="device", fix="use cpu or cuda")
    if found.type == "cpu":
        return found
    backend: Any = getattr(torch, found.type, None)
    if not hasattr(backend, "is_available") or not backend.is_available():
        raise GracecError(
            f"there is no {found.type} on this machine, or torch is built without it",
            where="device",
            fix="use cpu",
        )
    count = backend.device_count()
    if (_number(found) or 0) >= count:
        raise GracecError(
            f"there is no {found}, the machine has {count} of {found.type}",
            where="device",
            fix=f"use {found.type}:{count - 1}" if count else "use cpu",
        )
    return found


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype that models run in; None is none.

    Raises:
        GracecError: if it is no such dtype.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise GracecError(f"unknown dtype {name!r}", where="dtype", fix=f"use {', '.join(DTYPES)}")
    return DTYPES[name]


def device_and_dtype(
    device: str | torch.device | torch.dtype | None, dtype: torch.dtype | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """What `to` of a model is asked for: the first may be either, as torch has it."""
    if isinstance(device, torch.dtype):
        return None, device
    return None if device is None else torch.device(device), dtype


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are one device; without a number it is the current one."""
    if one.type != other.type or one.type == "cpu":
        return one.type == other.type
    current = getattr(getattr(torch, one.type), "current_device", lambda: 0)
    here, there = (
        current() if number is None else number for number in (_number(one), _number(other))
    )
    return bool(here == there)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is an accelerator that multiplies bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "cpu" and torch.amp.is_autocast_available(device.type)


def _number(device: torch.device) -> int | None:
    """Which of its type it is; the stubs know of no device without a number."""
    found: Any = device.index
    return None if found is None else int(found)
