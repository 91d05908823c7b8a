"""What a quantizer hands over: its weights on their grid, and what it took. Imports no gracec.

A folder with weights.safetensors, the dequantized weights in float32 and whatever else the tool
changed, by the names of the decoder; and made.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cells import LINEARS, fitting
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evidence"))
from peer_gptq import check_grid, levels

SCALE_BITS = 16
"""Counted for a scale of every tool, since all ship such; here the peers' are kept in float32."""


def options(methods: Sequence[str]) -> argparse.Namespace:
    """The arguments that the script of every tool takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--windows", type=Path, help="token ids that calibrate, as JSON lists")
    parser.add_argument("--runtime", default="", help="of gracec")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def calibration(options: argparse.Namespace) -> Tensor:
    """Token ids [n, T]."""
    if options.windows is None:
        raise SystemExit(f"{options.method} needs --windows")
    return torch.tensor(json.loads(options.windows.read_text(encoding="utf-8")))


class Clock:
    """What is between `with`: seconds, seconds of processors, which say more on a busy machine, and
    the peak of the process at its end, which loading the model may have set."""

    seconds = 0.0
    cpu_seconds = 0.0
    peak_mib = 0.0
    load = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self.load = os.getloadavg()[0]
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        self.peak_mib = int(peak) / 1024


def groups_of(state: Mapping[str, Tensor], group_size: int) -> dict[str, int]:
    """Group of every weight that is to be quantized."""
    return {
        name: fitting(group_size, weight.shape[1])
        for name, weight in state.items()
        if LINEARS.fullmatch(name)
    }


def on_grid(name: str, weight: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Codes times scales of a weight that is so but for the rounding of its own arithmetic.

    Raises:
        ValueError: a value is off the grid by more than rounding to its dtype explains.
    """
    rounding = max(2 * torch.finfo(weight.dtype).eps, 1e-5) * 2 ** (bits - 1)
    scale = scale.float().reshape(len(weight), -1)
    steps = scale.repeat_interleave(group, dim=1)
    codes = torch.round(weight.float() / steps)
    off = float((weight.float() / steps - codes).abs().max())
    if off > rounding:
        raise ValueError(f"{name}: a value is {off} steps off the grid")
    written = codes * steps
    check_grid(name, written, scale, bits, group)
    return written


def on_affine_grid(
    name: str, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int
) -> Tensor:
    """(codes - zeros) times scales, in float32; raises where codes are no codes of `bits` bits.

    Args:
        codes: [N, K], from 0.
        scale, zero: [N, K / group].
    """
    if scale.shape != (len(codes), codes.shape[1] // group) or zero.shape != scale.shape:
        raise ValueError(f"{name}: scales {tuple(scale.shape)} for {tuple(codes.shape)}")
    if not torch.equal(codes, codes.round()) or codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"{name}: codes from {codes.min()} to {codes.max()} for {bits} bits")
    spread = [t.float().repeat_interleave(group, dim=1) for t in (zero, scale)]
    return (codes.float() - spread[0]) * spread[1]


def hand_over(
    asked: argparse.Namespace,
    weights: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    clock: Clock,
    packages: Sequence[str],
    *,
    also: Mapping[str, Tensor] | None = None,
    zero_bits: int = 0,
    **facts: Any,
) -> None:
    """Write the folder.

    Args:
        weights: name -> dequantized weight.
        original: what the tool was given.
        also: other tensors that it changed.
        zero_bits: of a zero point, one a group.
        facts: options and whatever else should be known.

    Raises:
        SystemExit: not all linears were quantized, or one is not on a grid of so many levels.
    """
    groups = groups_of(original, asked.group_size)
    if set(weights) != set(groups):
        raise SystemExit(f"quantized otherwise than asked: {sorted(set(weights) ^ set(groups))}")
    for name, weight in weights.items():
        if levels(weight, groups[name]) > 2**asked.bits:
            raise SystemExit(f"{name} is not on a grid of {asked.bits} bits")
    numbers = sum(weight.numel() for weight in weights.values())
    of_groups = sum(weight.numel() / groups[name] for name, weight in weights.items())
    bits = asked.bits + (SCALE_BITS + zero_bits) * of_groups / numbers
    made = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "bits_per_weight": round(bits, 3),
        "seconds": round(clock.seconds, 1),
        "cpu_seconds": round(clock.cpu_seconds, 1),
        "peak_mib": round(clock.peak_mib),
        "load": round(clock.load, 2),
        "threads": torch.get_num_threads(),
        "also_changed": sorted(also or {}),
        **facts,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    tensors |= {name: tensor.float().contiguous() for name, tensor in (also or {}).items()}
    save_file(tensors, asked.out / "weights.safetensors")
    (asked.out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
