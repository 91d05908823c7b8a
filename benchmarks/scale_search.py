"""Time and memory of the scale search, and of turning a weight into codes and back.

    python benchmarks/scale_search.py       writes benchmarks/results/scale_search.json

The billion weights have the shapes below; one thread searches each once.
Memory is what the resident set grows by while a weight is worked on, the result included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from measure import forget_peak, in_a_process, peak_mib, resident_mib, write_result

from gracec import quant

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""Linears of one decoder block of a 7B model."""
BITS, GROUP_SIZE, CANDIDATES = 4, 128, 64
LAYER_BYTES = 2
"""bfloat16, the dtype in which such weights are kept."""


def speed(threads: int, weights: float) -> dict[str, Any]:
    """Search so many weights, block after block."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    made = {shape: torch.randn(shape, generator=generator).bfloat16() for shape in {*SHAPES}}
    quant.search_scales(made[4096, 4096][:64], BITS, GROUP_SIZE)
    count, seconds = 0, 0.0
    while count < weights:
        for shape in SHAPES:
            start = time.perf_counter()
            quant.search_scales(made[shape], BITS, GROUP_SIZE, candidates=CANDIDATES)
            seconds += time.perf_counter() - start
            count += made[shape].numel()
    return {
        "threads": threads,
        "weights": count,
        "seconds": round(seconds, 1),
        "ns_per_weight_and_candidate": round(seconds / count / CANDIDATES * 1e9, 3),
        "minutes_for_7B": round(seconds / count * 7e9 / 60, 1),
    }


def memory(step: str) -> dict[str, Any]:
    """One step on the largest layer."""
    torch.set_num_threads(1)
    shape = SHAPES[-1]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    scales = quant.search_scales(weight, BITS, GROUP_SIZE, candidates=1)
    codes = quant.quantize(weight, scales, BITS, GROUP_SIZE)
    work = {
        "search_scales": lambda: quant.search_scales(weight, BITS, GROUP_SIZE, candidates=4),
        "quantize": lambda: quant.quantize(weight, scales, BITS, GROUP_SIZE),
        "dequantize": lambda: quant.dequantize(codes, scales, GROUP_SIZE, torch.bfloat16),
    }
    forget_peak()
    before = resident_mib()
    work[step]()
    layer = weight.numel() * LAYER_BYTES / 2**20
    grown = peak_mib() - before
    return {
        "step": step,
        "layer_mib": round(layer),
        "peak_mib_on_top": round(grown),
        "share_of_layer": round(grown / layer, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, default=1e9, help="to search, at least")
    parser.add_argument("--threads", type=int, help="only the speed with so many threads")
    parser.add_argument("--step", help="only the memory of this step")
    options = parser.parse_args()
    if options.threads:
        print(json.dumps(speed(options.threads, options.weights)))
        return
    if options.step:
        print(json.dumps(memory(options.step)))
        return
    load = os.getloadavg()[0]
    rows = [in_a_process(__file__, {"threads": 1, "weights": options.weights})]
    rows += [
        in_a_process(__file__, {"step": s}) for s in ("search_scales", "quantize", "dequantize")
    ]
    write_result(
        "scale_search",
        f"scale search, INT{BITS} g{GROUP_SIZE}, {CANDIDATES} candidates, bfloat16",
        rows,
        load=load,
    )


if __name__ == "__main__":
    main()
