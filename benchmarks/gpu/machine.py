"""The device that is measured: what it is, and how long and in how much memory something runs."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from measure import environment

PACKAGES = ("torchao", "transformers", "triton", "numpy", "accelerate")
MANY = 20
"""Runs of a kernel between two looks at the clock."""


class Machine:
    """A device, and whether the models are small ones that only try the script.

    Attributes:
        device: what everything is computed on.
        small: models of a few thousand weights, and as few steps as show that it works.
    """

    def __init__(self, name: str, *, small: bool) -> None:
        self.device, self.small = torch.device(name), small
        self.gpu = self.device.type == "cuda"
        self._before = 0

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give memory back that nothing holds, and let the peak begin again."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)

    def memory(self) -> dict[str, float]:
        """Most memory that tensors took since `forget`, and how much of it is on top of what was
        there then: models that others need too. Nothing where nobody counts it."""
        if not self.gpu:
            return {}
        peak = torch.cuda.max_memory_allocated(self.device)
        return {"peak_gib": gib(peak), "on_top_gib": gib(peak - self._before)}

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def kernel_us(self, run: Callable[[], Any]) -> float:
        """Median microseconds of a kernel, without what Python takes to launch it: many runs are
        one CUDA graph. On another device they follow each other."""
        for _ in range(3):
            run()

        def many() -> None:
            for _ in range(MANY):
                run()

        if self.gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                many()
            many = graph.replay
        many()
        return round(1e6 * statistics.median(self.seconds(many) for _ in range(5)) / MANY, 2)

    def describe(self, load: float) -> dict[str, Any]:
        """What a reader has to know of the machine; nothing of it is written in this script."""
        found = environment(load) | {"versions": _versions(), "small": self.small}
        if not self.gpu:
            return found | {"device": self.device.type}
        properties = torch.cuda.get_device_properties(self.device)
        return found | {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": gib(properties.total_memory),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }


def gib(count: float) -> float:
    return round(count / 2**30, 2)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()
