"""The states of the random number generators of a run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from gracec.errors import GracecError

SAVED = ("cuda", "xpu")
"""Devices that say the state of each of them."""


@dataclass(frozen=True, eq=False)
class RngState:
    """The states of the random number generators: of torch, Python and NumPy.

    Attributes:
        tensors: "torch", "python", "numpy", and "device" of a training on a GPU.
        scalars: what else Python and NumPy keep; JSON-able.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


def rng_state(device: torch.device) -> RngState:
    """The states of the generators of torch, Python and NumPy, and of the device of a training.

    No other device is asked: that would take memory of each.

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
    if device.type in SAVED:
        tensors["device"] = torch.get_device_module(device).get_rng_state(device)
    scalars = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }
    return RngState(tensors, scalars)


def set_rng_state(state: RngState, device: torch.device) -> None:
    """Put the generators into a state that `rng_state` took on a device of the same type."""
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
    if device.type in SAVED and "device" in state.tensors:
        torch.get_device_module(device).set_rng_state(state.tensors["device"], device)
