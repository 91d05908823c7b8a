"""Time of an optimizer step of GRACE with a teacher that runs, and with one that is in files.

    python benchmarks/teacher_cache.py        writes benchmarks/results/teacher_cache.json

A student of 30 and a teacher of 120 million random parameters, in float32, on the same 16 samples
in micro-batches of 4. Every row is a process of its own, and its seconds are those of the
processor. The files are made before, in a folder of their own, and read anew in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import in_a_process, random_llava, write_result
from qat_step import student

VARIANTS = ("no teacher", "teacher runs", "teacher in files")
SAMPLES, TEXT, GROUP = 16, 48, 4


def teacher() -> Any:
    """A decoder of width 1,024 and 8 blocks."""
    return random_llava(
        {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
        {
            "vocab_size": 8192,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
        },
    )


def batch_of(model: Any, numbers: Any) -> dict[str, torch.Tensor]:
    """Prompts about one picture each, padded on the right; every token of text is a target."""
    from gracec.capture import family_of
    from gracec.data.collate import PICTURES

    parts = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        options = {"batch": 1, "images": 1, "text": TEXT - number % 8}
        found = family_of(model).example_batch(model, **options, generator=generator)
        parts.append({**found, PICTURES: torch.full((1, 32), number, dtype=torch.uint8)})
    longest = max(part["input_ids"].shape[1] for part in parts)
    for part in parts:
        left = longest - part["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            part[name] = torch.nn.functional.pad(part[name], (0, left))
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 5, -100)
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row, in this process."""
    from gracec.capture import capture
    from gracec.passes import parse_pipeline, run_passes
    from gracec.recipe import Training
    from gracec.training.learner import Learner
    from gracec.training.loader import one_by_one
    from gracec.training.loop import Run
    from gracec.training.teacher_cache import Part, cached_teacher

    torch.set_num_threads(options.threads)
    taps, model = "insert-taps,select-supervised,return-head", student()

    def learner(of: Any, passes: str) -> Any:
        return Learner(run_passes(capture(of), parse_pipeline(passes)).program, of)

    fake = "plan-quantization,insert-fake-quant{candidates=4}"
    pupil = learner(model, f"analyze-modality,{fake},{taps}")
    distils = options.variant != "no teacher"
    off = {"kind": "none", "omega": 0}
    rule = Training.model_validate(
        {
            "batch_size": SAMPLES,
            "micro_batch_size": GROUP,
            "steps": 10**6,
            "distillation": {"omega_warmup": 0} if distils else off,
        }
    )
    row: dict[str, Any] = {"variant": options.variant}
    batches = one_by_one(lambda numbers: batch_of(model, numbers))
    taught = learner(teacher(), f"analyze-modality,{taps}") if distils else None
    filling = size = None
    if options.variant == "teacher in files":
        parts, began = [Part(batches, SAMPLES, "random")], time.process_time()
        found = cached_teacher(taught, parts, rule, folder, fingerprint="random", processor={})
        filling = round((time.process_time() - began) / SAMPLES, 3)
        taught = found.teacher
        files = list(folder.rglob("*.safetensors"))
        size = round(sum(file.stat().st_size for file in files) / len(files) / 2**20, 3)
    run = Run(pupil, taught, batches, SAMPLES, rule, None, None)
    seconds = []
    for _ in range(options.repeats + 1):
        start = time.process_time()
        run.take_step()
        seconds.append(time.process_time() - start)
    row |= {
        "seconds_median": round(statistics.median(seconds[1:]), 3),
        "seconds_min": round(min(seconds[1:]), 3),
        "seconds_max": round(max(seconds[1:]), 3),
        "filling_a_sample": filling,
        "of_a_sample_mib": size,
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--variant", choices=VARIANTS, help="only this row")
    options = parser.parse_args()
    if options.variant:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options, Path(folder))))
        return
    load = os.getloadavg()[0]
    common = {"threads": options.threads, "repeats": options.repeats}
    rows = [in_a_process(__file__, {**common, "variant": variant}) for variant in VARIANTS]
    what = f"an optimizer step of GRACE, teacher in files, {SAMPLES} samples, processor seconds"
    write_result("teacher_cache", what, rows, load=load)


if __name__ == "__main__":
    main()
