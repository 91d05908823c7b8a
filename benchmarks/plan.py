"""The plan of a training against the training: memory of a step and its seconds, on three shapes.

    python benchmarks/plan.py        writes benchmarks/results/plan.json

Each shape is a random student with a wider teacher, trained by `gracec.compile` in a process of its
own on the CPU, in one thread. Measured are the largest resident set of the second optimizer step
above what the process held before any model, and the seconds of that step and the next ones.
Memory is measured again with a C library that gives back what is freed; by default it keeps some
for later. Planned is the same, by a process that sees the configurations and the data, with three
rates of this machine: of a square matmul, of an addition, and of new memory. They are measured
before and after the steps of each shape, and have nothing of any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import forget_peak, in_a_process, peak_mib, resident_mib, write_result
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SAMPLES = 24
RATES = ("tflops", "bandwidth", "new_memory")
STEPS = 3
"""That are measured."""
SHAPES: dict[str, dict[str, Any]] = {
    "LLaVA, wide": {
        "family": "llava",
        "text": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
        "vocabulary": 8192,
        "teacher": 640,
        "image": 112,
        "words": 150,
        "training": {"batch_size": 8, "micro_batch_size": 4},
    },
    "Qwen2-VL, long pictures": {
        "family": "qwen2_vl",
        "text": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
        "vocabulary": 16384,
        "teacher": 512,
        "image": 320,
        "words": 60,
        "training": {"batch_size": 8, "micro_batch_size": 4},
    },
    "LLaVA, deep, a large vocabulary": {
        "family": "llava",
        "text": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 14},
        "vocabulary": 32768,
        "teacher": 384,
        "image": 64,
        "words": 240,
        "training": {"batch_size": 8, "micro_batch_size": 8},
    },
}


def recipe(shape: dict[str, Any]) -> Any:
    """GRACE without calibration, which is no part of a step."""
    from gracec.recipe import Recipe

    return Recipe.from_dict(
        {
            "name": "plan",
            "weights": {"decoder": {"bits": 4, "group_size": 128}},
            "calibration": {"method": "weights"},
            "scale_search": {"candidates": 2},
            "training": {"steps": STEPS + 2, "held_out": 0.1, **shape["training"]},
        }
    )


def write_models(shape: dict[str, Any], folder: Path) -> None:
    """Student and teacher with their processor."""
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    from tests.tiny import TEXT, tiny_config, tiny_processor
    from tests.tiny_families import MROPE, QWEN_IDS
    from tests.tiny_families import tiny_processor as processor_of

    qwen = shape["family"] == "qwen2_vl"
    for name, width in (("student", shape["text"]["hidden_size"]), ("teacher", shape["teacher"])):
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
        text = {**shape["text"], **heads, "hidden_size": width, "vocab_size": shape["vocabulary"]}
        text |= {"max_position_embeddings": 1024, "initializer_range": 0.02}
        if qwen:
            rope = {**MROPE, "mrope_section": [8, 12, 12]}
            tower = {"depth": 2, "embed_dim": 128, "num_heads": 4, "hidden_size": width}
            tower |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
            config: Any = Qwen2VLConfig(
                text_config={**TEXT, **text, "rope_parameters": rope},
                vision_config=tower,
                **QWEN_IDS,
            )
            processor: Any = processor_of("qwen2_vl")
            pixels = shape["image"] ** 2
            processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        else:
            tower = {"vision_image_size": shape["image"], "vision_hidden_size": 128}
            tower["image_seq_length"] = (shape["image"] // 8) ** 2
            config = tiny_config(**text, **tower)
            processor = tiny_processor()
            edge = {"height": shape["image"], "width": shape["image"]}
            processor.image_processor.size = processor.image_processor.crop_size = edge
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    print("{}")


def records(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Conversations about pictures of noise, some shorter than others."""
    from tests.tiny import WORDS

    generator = np.random.default_rng(0)
    letters = shape["family"] == "qwen2_vl"  # each is a token, as is a word of the others
    found = []
    for number in range(SAMPLES):
        side = shape["image"]
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        pixels[0, 0] = number
        count = shape["words"] - 10 * (number % 3)
        words = (
            "".join("abcde"[i % 5] for i in range(count))
            if letters
            else " ".join(generator.choice(WORDS[10:], count))
        )
        found.append(
            {
                "image": Image.fromarray(pixels),
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat is this ?"},
                    {"from": "gpt", "value": words},
                ],
            }
        )
    return found


class Steps:
    """Measures optimizer steps from the second one on, prints them and ends the process.

    Seconds are those that the process computes: other work on the machine takes none of them, but
    for what it takes of caches and of the memory's bandwidth.
    """

    def __init__(self, libraries: float) -> None:
        self.libraries, self.began, self.mib = libraries, 0.0, 0.0
        self.seconds: list[float] = []

    def on_step(self, step: int, figures: dict[str, Any]) -> bool:
        if step == 1:
            forget_peak()
        else:
            self.seconds.append(time.process_time() - self.began)
            self.mib = self.mib or peak_mib() - self.libraries
        if len(self.seconds) == STEPS:
            print(json.dumps({"mib": self.mib, "seconds": usual(self.seconds)}), flush=True)
            os._exit(0)
        self.began = time.process_time()
        return False


def measure(shape: dict[str, Any], folder: Path) -> None:
    """Train until the second step is over."""
    import gracec

    data, chosen = records(shape), recipe(shape)
    warm_up(chosen)
    libraries = resident_mib()
    gracec.compile(
        folder / "student",
        chosen,
        teacher=folder / "teacher",
        train_data=data,
        progress=False,
        callbacks=[Steps(libraries)],
    )


def warm_up(chosen: Any) -> None:
    """Load what a training loads: it is of the libraries, and of no model."""
    import gracec
    from gracec._memory import trim
    from tests.tiny import tiny_llava, tiny_processor

    small = {**SHAPES["LLaVA, wide"], "image": 32, "words": 30}
    options = {"train_data": records(small), "processor": tiny_processor(), "progress": False}
    gracec.compile(tiny_llava(hidden_size=128), chosen, **options)
    trim()


usual = statistics.median


def usual_seconds(work: Callable[[], Any]) -> float:
    """That the process computes."""
    found = []
    for _ in range(9):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return usual(found)


def rates() -> dict[str, float]:
    """What this machine does in a second in one thread, of operands that no shape has: a square
    matmul and both products of its gradient, an addition in memory that is there, and how much
    longer it takes in memory that is not: in a process that has freed nothing that it would get."""
    a, b = torch.randn(1000, 1000), torch.randn(1000, 1000)
    matmuls = usual_seconds(lambda: (a @ b.T, a @ b, a.T @ b))
    x, y = torch.randn(12 << 20), torch.randn(12 << 20)
    out = torch.empty_like(x)
    there, new = usual_seconds(lambda: torch.add(x, y, out=out)), usual_seconds(lambda: x + y)
    return {
        "tflops": 3 * 2 * 1000**3 / matmuls / 1e12,
        "bandwidth": 3 * x.nbytes / there / 1e9,
        "new_memory": x.nbytes / (new - there) / 1e9,
    }


def planned(shape: dict[str, Any], folder: Path, found: dict[str, float]) -> None:
    """The plan of the same training, with what the machine does."""
    import gracec

    plan = gracec.plan(
        folder / "student",
        recipe(shape),
        teacher=folder / "teacher",
        data=records(shape),
        device="cpu",
        **{f"device_{rate}": found[rate] for rate in RATES},
    )
    print(json.dumps(plan.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=("models", "rates", "measure", "plan"))
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path)
    for rate in RATES:
        parser.add_argument(f"--{rate}", type=float, help="of this machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work == "rates":
        print(json.dumps(rates()))
        return
    if options.work:
        shape = SHAPES[options.shape]
        if options.work == "plan":
            planned(shape, options.folder, vars(options))
        else:
            {"models": write_models, "measure": measure}[options.work](shape, options.folder)
        return
    load, rows = os.getloadavg()[0], []
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"shape": name, "folder": folder}
            in_a_process(__file__, {"work": "models", **arguments})
            before = in_a_process(__file__, {"work": "rates"})
            found = in_a_process(__file__, {"work": "measure", **arguments})
            after = in_a_process(__file__, {"work": "rates"})
            found |= {rate: (before[rate] + after[rate]) / 2 for rate in RATES}
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
            kept_back = found["mib"]
            found["mib"] = in_a_process(__file__, {"work": "measure", **arguments})["mib"]
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            of_machine = {rate: found[rate] for rate in RATES}
            plan = in_a_process(__file__, {"work": "plan", **arguments, **of_machine})
            rows.append(row(name, found, plan, kept_back))
    write_result("plan", "a training step as planned and as measured", rows, load=load)


def row(
    name: str, found: dict[str, float], plan: dict[str, Any], kept_back: float
) -> dict[str, Any]:
    """Planned beside measured."""
    mib, seconds = plan["wanted"]["peak"] / 2**20, plan["wanted"]["seconds_a_step"]
    return {
        "shape": name,
        "parameters": plan["parameters"],
        "tokens of the longest": plan["tokens"],
        "planned_mib": round(mib),
        "measured_mib": round(found["mib"]),
        "memory, planned over measured": round(mib / found["mib"], 2),
        "with what malloc keeps back_mib": round(kept_back),
        "TFLOP/s": round(found["tflops"], 3),
        "GB/s": round(found["bandwidth"], 1),
        "of new memory, GB/s": round(found["new_memory"], 2),
        "planned seconds": round(seconds, 2),
        "measured seconds": round(found["seconds"], 2),
        "seconds, planned over measured": round(seconds / found["seconds"], 2),
    }


if __name__ == "__main__":
    main()
