"""Share of a training step that waits for its samples, with worker processes and without.

    python benchmarks/loader.py        writes benchmarks/results/loader.json

GRACE steps of the shipped EmojiVQA student, 16 samples each, on its own pictures (PNG of 64 pixels)
and on the same ones enlarged to photographs (JPEG of 1280 pixels). The first step, in which workers
begin, is not counted.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import write_result
from PIL import Image

EMOJIVQA = Path(__file__).resolve().parents[1] / "examples" / "emojivqa"
STEPS = 8
WORKERS = (0, 1, 2)
PICTURES = {"PNG, 64 x 64": None, "JPEG, 1280 x 1280": 1280}
TRAINING = {"steps": STEPS + 1, "batch_size": 16, "micro_batch_size": 16}


def conversations(folder: Path, side: int | None) -> list[dict[str, Any]]:
    """Questions with their pictures as bytes, at another size."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        record["image"] = (folder / record["image"]).read_bytes()
        if side is not None:
            buffer = io.BytesIO()
            image = Image.open(io.BytesIO(record["image"])).convert("RGB")
            image.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            record["image"] = buffer.getvalue()
    return found


def learner(passes: str, directory: Path) -> Any:
    """A shipped model as a graph."""
    from gracec.capture import capture
    from gracec.models.loading import load_model
    from gracec.passes import parse_pipeline, run_passes
    from gracec.training.learner import Learner

    model = load_model(directory)
    return Learner(run_passes(capture(model), parse_pipeline(passes)).program, model)


def times(student: Any, teacher: Any, samples: Any, rule: Any, workers: int) -> dict[str, Any]:
    """Of the steps after the first."""
    from gracec.training.loader import Loader
    from gracec.training.loop import Run

    run = Run(student, teacher, Loader(samples, workers), len(samples), rule, None, None)
    for _ in range(STEPS + 1):
        run.take_step()
    assert run.ahead is not None
    run.ahead.close()
    counted = run.curve.seconds[1:]
    whole, data = sum(one.whole for one in counted), sum(one.data for one in counted)
    return {
        "workers": workers,
        "seconds a step": round(whole / STEPS, 3),
        "of it waiting for data": round(data / STEPS, 4),
        "percent": round(100 * data / whole, 1),
    }


def measure() -> list[dict[str, Any]]:
    """A row for each kind of picture and number of workers."""
    sys.path.append(str(EMOJIVQA))
    from make_dataset import write

    from gracec.data.collate import Collator
    from gracec.models.loading import load_processor
    from gracec.recipe import Training
    from gracec.training.samples import open_samples

    taps = "insert-taps,select-supervised,return-head"
    fake = "plan-quantization,insert-fake-quant{candidates=4}"
    student = learner(f"analyze-modality,{fake},{taps}", EMOJIVQA / "student")
    teacher = learner(f"analyze-modality,{taps}", EMOJIVQA / "teacher")
    rule = Training.model_validate(TRAINING)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write("train", Path(folder), 200)
        for name, side in PICTURES.items():
            records = conversations(Path(folder), side)
            collate = Collator(load_processor(EMOJIVQA / "student"), student.model)
            samples, _ = open_samples(records, None, rule, collate)
            for workers in WORKERS:
                row = times(student, teacher, samples, rule, workers)
                rows.append({"pictures": name, **row})
    return rows


def main() -> None:
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    what = "waiting for samples in a GRACE step of the shipped student"
    write_result("loader", what, measure(), load=load)


if __name__ == "__main__":
    main()
