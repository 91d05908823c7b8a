"""INT4 kernels: whether they multiply by exactly the codes, and how long they take."""

from __future__ import annotations

from functools import partial

import torch
from machine import Machine
from sections import Figures, Item
from torch.nn import functional

from gracec import gates, quant
from gracec.kernels import torchao

LAYERS = {
    "LLaVA-7B attention": (4096, 4096, 128),
    "LLaVA-7B up": (11008, 4096, 128),
    "LLaVA-7B down": (4096, 11008, 128),
    "Qwen2-VL-2B up": (8960, 1536, 128),
    "Qwen2-VL-2B down": (1536, 8960, 64),
    "narrow": (256, 1536, 32),
}
"""Output features, input features and the group of layers that people have."""
SMALL = {"narrow": (256, 512, 32)}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SMALL_BATCHES = (1, 16, 512)


def items(machine: Machine) -> list[Item]:
    layers = SMALL if machine.small else LAYERS
    return [(name, partial(layer, machine, *shape)) for name, shape in layers.items()]


def layer(machine: Machine, rows: int, columns: int, group: int) -> Figures:
    """One weight: packed, read back, held to float64, and timed beside the same weight in bf16.

    Raises:
        RuntimeError: if no kernel takes it, or one multiplies by something else.
    """
    device, narrow = machine.device, torch.bfloat16
    refusal = torchao.refusal((rows, columns), quant.QuantSpec(group_size=group), narrow, device)
    if refusal:
        raise RuntimeError(refusal)
    generator = torch.Generator().manual_seed(rows)
    drawn = torch.randn(rows, columns, generator=generator) / columns**0.5
    weight = drawn.to(device)
    searched = machine.seconds(lambda: quant.search_scales(weight, 4, group))
    scales = quant.search_scales(weight, 4, group)
    codes = quant.quantize(weight, scales, 4, group)
    packed = torchao.pack(codes, scales, group, narrow)
    difference = torchao.read_back_difference(packed, codes, scales, group)
    dense = quant.dequantize(codes, scales, group, narrow)
    if difference or not torch.equal(torchao.unpack(packed), dense):
        raise RuntimeError(f"what is packed is something else: {difference or 'read by ones'}")
    x = torch.randn(8, columns, generator=generator).to(device, narrow)
    exact = x.double() @ dense.double().t()
    with torchao.CountInt4Kernels() as kernels:
        found = functional.linear(x, packed)
    if kernels.count != 1:
        raise RuntimeError(f"{kernels.count} INT4 kernels ran in one linear")
    error, bound = _error(found, exact), gates.MATMUL_BOUND[narrow]
    if not error <= bound:
        raise RuntimeError(f"it is off by {error} of the largest output, the bound is {bound}")
    return {
        "shape": f"{rows} x {columns}, g{group}",
        "kernel": type(packed).__name__,
        "scale_search_ms": round(1e3 * searched, 2),
        "error": error,
        "error_bf16": _error(functional.linear(x, dense), exact),
        "repeats": torch.equal(found, functional.linear(x, packed)),
        "us": {
            str(batch): _times(machine, batch, dense, packed)
            for batch in (SMALL_BATCHES if machine.small else BATCHES)
        },
    }


def _times(
    machine: Machine, batch: int, dense: torch.Tensor, packed: torch.Tensor
) -> dict[str, float]:
    """Microseconds of a linear of so many rows."""
    x = torch.randn(batch, dense.shape[1], device=machine.device, dtype=dense.dtype)
    weights = {"bf16": dense, "int4": packed}
    return {n: machine.kernel_us(partial(functional.linear, x, w)) for n, w in weights.items()}


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the largest output, against float64."""
    return float(f"{((found.double() - exact).abs().max() / exact.abs().max()).item():.3g}")
