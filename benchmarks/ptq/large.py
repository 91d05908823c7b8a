"""Time and memory of calibrating a decoder of 1.1 billion weights, and what larger ones would take.

    python benchmarks/ptq/large.py       writes benchmarks/results/ptq_large.json

The weights are random, so that only seconds and memory mean something. The model is made in
bfloat16 and quantized to 4 bits in groups of 128 on plain text, 32 windows of 512 random words. The
peak is the largest resident set of the process while it compiles. Other sizes are extrapolated: the
seconds of each kind of work are measured, and scaled by its operations, for each decoder linear of
N outputs and K inputs and n tokens:

    forward         n N K, the quantized prefix
    second moments  n K^2 for each set of linears that share their inputs
    factorization   K^3 for each such set, in float64
    search          N K, of scales
    rounding        N K^2
    comparison      n N K, with plain rounding on held-out tokens
    the rest        N K: capture, gates, packing

It is an estimate, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
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
        """Kind of work -> what its seconds grow with, of all blocks."""
        pairs = self.sets()
        of_block = {
            "forward": sum(tokens * n * k for n, k in pairs),
            "second moments": sum(tokens * k**2 for _, k in pairs),
            "factorization": sum(k**3 for _, k in pairs),
            "search": sum(n * k for n, k in pairs),
            "rounding": sum(n * k**2 for n, k in pairs),
            "comparison": sum(tokens * n * k for n, k in pairs),
            "the rest": sum(n * k for n, k in pairs),
        }
        return {kind: float(self.layers * value) for kind, value in of_block.items()}


MEASURED = Shape(22, 2048, 5632, 1024)
OTHERS: Mapping[str, Shape] = {
    "2B (as Qwen2-VL-2B)": Shape(28, 1536, 8960, 256),
    "7B (as LLaVA-1.5-7B)": Shape(32, 4096, 11008, 4096),
}


class Stopwatch:
    """Seconds of the kinds of work of a calibration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, kind: str) -> None:
        """Have a function of a module or a class timed from now on."""
        timed = getattr(owner, name)

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return timed(*arguments, **named)
            finally:
                self.seconds[kind] += time.perf_counter() - start

        setattr(owner, name, run)

    def watch_calibration(self) -> None:
        from gracec import quant
        from gracec.passes import correct_codes

        self.watch(correct_codes.Stream, "advance", "forward")
        self.watch(correct_codes.SecondMoments, "add", "second moments")
        self.watch(correct_codes, "factor", "factorization")
        self.watch(quant, "search_scales", "search")
        self.watch(correct_codes, "corrected_codes", "rounding")
        self.watch(correct_codes.Candidates, "of", "comparison")


def measure(tokens: int, threads: int) -> dict[str, Any]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "decode"))
    from models import as_llava, processor, random_decoder

    import gracec
    from gracec.recipe import Recipe

    torch.set_num_threads(threads)
    model = as_llava(random_decoder("1b")).to(torch.bfloat16)
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
    watch = Stopwatch()
    watch.watch_calibration()
    forget_peak()
    start = time.perf_counter()
    compiled = gracec.compile(
        model, recipe, processor=words, train_data=texts, inplace=True, progress=False
    )
    seconds = time.perf_counter() - start
    peak = peak_mib()
    watch.seconds["the rest"] = seconds - sum(watch.seconds.values())
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
        **{f"seconds of {kind}": round(one) for kind, one in watch.seconds.items()},
    }


def extrapolated(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the other decoders, each kind of work scaled by its operations."""
    own = MEASURED.operations(row["tokens"])
    found = []
    for name, shape in OTHERS.items():
        work = shape.operations(row["tokens"])
        seconds = {
            kind: row[f"seconds of {kind}"] * work[kind] / own[kind]
            for kind in work
            if f"seconds of {kind}" in row
        }
        known = {"decoder": name, "measured": False, "tokens": row["tokens"]}
        known |= {"minutes": round(sum(seconds.values()) / 60, 1)}
        known |= {f"seconds of {kind}": round(one) for kind, one in seconds.items()}
        found.append(known)
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
