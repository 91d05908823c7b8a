"""Time and memory of calibrating a decoder of 1.1 billion weights, and what larger ones would take.

    python benchmarks/ptq/large.py       writes benchmarks/results/ptq_large.json

The weights are random, so that only seconds and memory mean something. The model is made in
bfloat16 and quantized to 4 bits in groups of 128 on plain text, 32 windows of 512 random words. The
peak is the largest resident set of the process while it compiles. Other sizes are extrapolated:
seconds of the whole measured compilation, shared out by the operations of each kind of work, for
each decoder linear of N outputs and K inputs and n tokens:

    forward         2 n N K, three times: to observe, and as original and quantized prefix
    second moments  2 n K^2 for each set of linears that share their inputs
    factorization   K^3 for each such set, in float64, counted four times
    rounding        N K^2

so that what grows with K^3 takes a larger part there. It is an estimate, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import forget_peak, in_a_process, peak_mib, write_result

WINDOW = 512


@dataclass(frozen=True)
class Shape:
    """What the work depends on, of a decoder with gated MLPs."""

    layers: int
    hidden: int
    intermediate: int
    key_values: int

    def sets(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the linears that share their inputs, in one block."""
        return (
            (self.hidden + 2 * self.key_values, self.hidden),
            (self.hidden, self.hidden),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )

    def operations(self, tokens: int) -> dict[str, float]:
        """Kind of work -> operations of all blocks."""
        pairs = self.sets()
        of_block = {
            "forward": sum(3 * 2 * tokens * n * k for n, k in pairs),
            "second_moments": sum(2 * tokens * k**2 for _, k in pairs),
            "factorization": sum(4 * k**3 for _, k in pairs),
            "rounding": sum(n * k**2 for n, k in pairs),
        }
        return {kind: float(self.layers * value) for kind, value in of_block.items()}

    @property
    def weights(self) -> int:
        return self.layers * sum(n * k for n, k in self.sets())


MEASURED = Shape(22, 2048, 5632, 1024)
OTHERS: Mapping[str, Shape] = {
    "2B (as Qwen2-VL-2B)": Shape(28, 1536, 8960, 256),
    "7B (as LLaVA-1.5-7B)": Shape(32, 4096, 11008, 4096),
}


def measure(tokens: int, threads: int) -> dict[str, Any]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "decode"))
    from models import as_llava, processor, random_decoder

    import gracec
    from gracec.recipe import Recipe

    torch.set_num_threads(threads)
    model = as_llava(random_decoder("1b").to(torch.bfloat16))
    bf16 = sum(parameter.numel() for parameter in model.parameters()) * 2 / 2**20
    vocabulary = model.config.text_config.vocab_size
    drawn = torch.randint(
        6, vocabulary, (tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0)
    )
    texts = [{"text": " ".join(str(number) for number in row)} for row in drawn.tolist()]
    recipe = Recipe.from_dict(
        {
            "name": "w4-g128-calibrated",
            "weights": {"decoder": {"bits": 4, "group_size": 128}},
            "calibration": {"tokens": tokens},
        }
    )
    words = processor(vocabulary)
    forget_peak()
    start = time.perf_counter()
    compiled = gracec.compile(
        model, recipe, processor=words, train_data=texts, inplace=True, progress=False
    )
    seconds = time.perf_counter() - start
    peak = peak_mib()
    return {
        "decoder": "1.1 billion random weights",
        "measured": True,
        "tokens": tokens,
        "threads": threads,
        "minutes": round(seconds / 60, 1),
        "peak_mib": round(peak),
        "bf16_mib": round(bf16),
        "peak_over_bf16": round(peak / bf16, 2),
        "int4_weights": compiled.report.gates["int4_kernels"].count,
    }


def extrapolated(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the other decoders, by operations."""
    own = sum(MEASURED.operations(row["tokens"]).values())
    found = []
    for name, shape in OTHERS.items():
        work = shape.operations(row["tokens"])
        total = sum(work.values())
        shares = {f"{kind}_share": round(value / total, 2) for kind, value in work.items()}
        minutes = round(row["minutes"] * total / own, 1)
        known = {"decoder": name, "measured": False, "tokens": row["tokens"]}
        known |= {"linear_weights_billion": round(shape.weights / 1e9, 2), "minutes": minutes}
        found.append(known | shares)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", action="store_true", help="print the row, write nothing")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.tokens, options.threads)))
        return
    load = os.getloadavg()[0]
    arguments = {"tokens": options.tokens, "threads": options.threads}
    row = in_a_process(__file__, {**arguments, "row": True})
    what = "calibrated quantization of 1.1 billion weights, and estimates for more"
    write_result("ptq_large", what, [row, *extrapolated(row)], script="ptq/large.py", load=load)


if __name__ == "__main__":
    main()
