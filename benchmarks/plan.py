"""The plan of a training against the training: memory of a step and its seconds, on three shapes.

    python benchmarks/plan.py        writes benchmarks/results/plan.json

Each shape is a random student with a wider teacher, trained by `gracec.compile` in a process of its
own on the CPU. Measured is the second optimizer step: the largest resident set above what the
process held before any model, and the seconds. Memory is measured again with a C library that gives
back what is freed; by default it keeps some for later. Planned is the same, by a process that sees
the configurations and the data, with the rates of matmuls of
these sizes and of an addition on this machine.
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
            "training": {"steps": 3, "held_out": 0.1, **shape["training"]},
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


class SecondStep:
    """Measures the second optimizer step, prints it and ends the process.

    Seconds are those that the process computes: other work on the machine takes none of them.
    """

    def __init__(self, shape: dict[str, Any], libraries: float) -> None:
        self.shape, self.libraries, self.began = shape, libraries, 0.0

    def on_step(self, step: int, figures: dict[str, Any]) -> bool:
        if step == 1:
            forget_peak()
            self.began = time.process_time()
            return False
        seconds = time.process_time() - self.began
        found = {
            "mib": peak_mib() - self.libraries,
            "seconds": seconds,
            "tflops": matmul_tflops(self.shape),
            "bandwidth": copy_bandwidth(),
        }
        print(json.dumps(found), flush=True)
        os._exit(0)


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
        callbacks=[SecondStep(shape, libraries)],
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


def usual_seconds(work: Callable[[], Any]) -> float:
    """That the process computes."""
    found = []
    for _ in range(9):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


def matmul_tflops(shape: dict[str, Any]) -> float:
    """What matmuls reach that are as large as those of the student, in 10^12 operations a second:
    one of each block, and the head, forward and backward."""
    text, micro = shape["text"], shape["training"]["micro_batch_size"]
    width, blocks = text["hidden_size"], text["num_hidden_layers"]
    sizes = (
        (blocks, 300 * micro, text["intermediate_size"]),
        (1, shape["words"] * micro, shape["vocabulary"]),
    )
    operations = seconds = 0.0
    for count, rows, outputs in sizes:
        x, w, g = (torch.randn(size) for size in ((rows, width), (outputs, width), (rows, outputs)))
        for work in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):  # noqa: B023
            operations += count * 2 * rows * width * outputs
            seconds += count * usual_seconds(work)
    return operations / seconds / 1e12


def copy_bandwidth() -> float:
    """Memory that an addition reads and writes, in 10^9 bytes a second."""
    x, y = torch.randn(4 << 20), torch.randn(4 << 20)
    return 3 * x.nbytes / usual_seconds(lambda: x + y) / 1e9


def planned(shape: dict[str, Any], folder: Path, tflops: float, bandwidth: float) -> None:
    """The plan of the same training."""
    import gracec

    found = gracec.plan(
        folder / "student",
        recipe(shape),
        teacher=folder / "teacher",
        data=records(shape),
        device="cpu",
        device_tflops=tflops,
        device_bandwidth=bandwidth,
    )
    print(json.dumps(found.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=("models", "measure", "plan"))
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tflops", type=float, help="of this machine")
    parser.add_argument("--bandwidth", type=float, help="of this machine, in GB/s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work:
        shape = SHAPES[options.shape]
        if options.work == "plan":
            planned(shape, options.folder, options.tflops, options.bandwidth)
        else:
            {"models": write_models, "measure": measure}[options.work](shape, options.folder)
        return
    load, rows = os.getloadavg()[0], []
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"shape": name, "folder": folder}
            in_a_process(__file__, {"work": "models", **arguments})
            found = in_a_process(__file__, {"work": "measure", **arguments})
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
            kept_back = found["mib"]
            found["mib"] = in_a_process(__file__, {"work": "measure", **arguments})["mib"]
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            rates = {rate: found[rate] for rate in ("tflops", "bandwidth")}
            plan = in_a_process(__file__, {"work": "plan", **arguments, **rates})
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
        "planned seconds": round(seconds, 2),
        "measured seconds": round(found["seconds"], 2),
        "seconds, planned over measured": round(seconds / found["seconds"], 2),
    }


if __name__ == "__main__":
    main()
