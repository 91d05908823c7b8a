"""The dtype that the objective computes in: float32, or float64 for float64 inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of computation; no copy when it has it already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keeps autocast, on the device of `x`, from computing in a narrower dtype."""
    return torch.autocast(x.device.type, enabled=False)
