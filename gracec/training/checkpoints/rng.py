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


@dataclass(frozen=True, eq=False)
class RngState:
    """The states of the random number generators: of torch, Python and NumPy.

    Attributes:
        tensors: "torch", "cuda:0" and so on, "python", "numpy".
        scalars: what else Python and NumPy keep; JSON-able.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


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
