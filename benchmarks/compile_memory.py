"""Peak memory of compiling a random model of about a billion parameters, shaped like LLaVA.

    python benchmarks/compile_memory.py      writes benchmarks/results/compile_memory.json

The model is made in bfloat16 and compiled by `w4a16-ptq` with `inplace=True`. The peak is the
largest resident set of the process while it compiles: model, codes, packed weights, libraries and
temporaries together.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from measure import (
    forget_peak,
    in_a_process,
    peak_mib,
    random_llava,
    resident_mib,
    write_result,
)

import gracec


def measure(layers: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    libraries = resident_mib()
    model = random_llava(
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        {
            "vocab_size": 32064,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
        },
        torch.bfloat16,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bf16 = parameters * 2 / 2**20
    forget_peak()
    start = time.perf_counter()
    compiled = gracec.compile(model, inplace=True)
    seconds = time.perf_counter() - start
    peak = peak_mib()
    return {
        "parameters": parameters,
        "bf16_mib": round(bf16),
        "libraries_mib": round(libraries),
        "peak_mib": round(peak),
        "peak_over_bf16": round(peak / bf16, 2),
        "resident_mib_after": round(resident_mib()),
        "int4_weights": compiled.report.gates["int4_kernels"].count,
        "compiled_mib": round(compiled.report.sizes["compiled"] / 2**20),
        "threads": threads,
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=20, help="decoder blocks; 20 give 1.1 billion"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", action="store_true", help="print the row, write nothing")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.layers, options.threads)))
        return
    load = os.getloadavg()[0]
    arguments = {"layers": options.layers, "threads": options.threads}
    row = in_a_process(__file__, {**arguments, "row": True})
    write_result("compile_memory", "peak memory of gracec.compile, w4a16-ptq", [row], load=load)


if __name__ == "__main__":
    main()
