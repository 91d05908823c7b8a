"""What quantized activations cost in answers and gain in speed, with ONNX Runtime.

python benchmarks/activations.py       writes benchmarks/results/activations.json

Rows of answers: the shipped student on questions of the test split; its activations are calibrated
on the train split, and the rows that say so are trained there by the recipe of the demo. Rows of
speed: the vision encoder on one thread, the variants one after the other in each round, and the
median over the rounds of the ratio to float32 in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import in_a_process, random_llava, write_result
from transformers import PreTrainedModel

import gracec
from gracec.backends.onnx import graphs
from gracec.backends.onnx.session import open_session
from gracec.capture import capture, capture_serving
from gracec.capture.serving_graph import VISION
from gracec.data.prompts import encode_questions
from gracec.demo import TRAINING_QUESTIONS, write_questions
from gracec.evaluate import VqaReport, evaluate_vqa, load_samples
from gracec.gates import logit_agreement
from gracec.models.loading import load_model, load_processor
from gracec.passes import Pass, run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.insert_observers import InsertObservers
from gracec.passes.lower_qdq import LowerQdq
from gracec.passes.plan_quantization import PlanQuantization
from gracec.passes.strip import drop_dead
from gracec.recipe import Recipe

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "emojivqa"
CALIBRATION, PROMPTS = 128, 64
ORIGINAL = "float32, torch"
VARIANTS = {
    ORIGINAL: (),
    "w4a16-ptq": ("faithful", "fast"),
    "w4a8": ("faithful", "fast"),
    "w8a8": ("faithful",),
    "w8a8, 8-bit codes": ("faithful",),
    "w4a16, trained": ("faithful", "fast"),
    "w4a8, trained": ("faithful", "fast"),
}
TOWERS = {"shipped student": 64, "CLIP-B/16, 3 layers, random": 224}
"""Vision encoder -> side of its images."""
ROUNDS = 25


def recipe_of(name: str) -> Recipe:
    """A built-in recipe, with all 8 bits of a code or the training of the demo where asked for."""
    base, _, change = name.partition(", ")
    fields = Recipe.load(base).to_dict()
    if change == "8-bit codes":
        for rule in fields["weights"].values():
            rule["bits"] = 8
    if change == "trained":
        demo = Recipe.load(EXAMPLE / "grace.yaml").to_dict()
        fields |= {part: demo[part] for part in ("weights", "training")}
    return Recipe.from_dict(fields)


def prompt_logits(model: Any, processor: Any, samples: Sequence[Any]) -> list[torch.Tensor]:
    """Logits [1, T, V] of each question, which is asked alone and so is not padded."""
    found = []
    for sample in samples:
        inputs = dict(encode_questions(processor, [sample.question], [sample.picture()]))
        with torch.no_grad():
            result = model(**inputs)
        found.append(getattr(result, "logits", result).float())
    return found


def divergence(reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Mean over the questions of the mean KL over their positions, in nats."""
    pairs = zip(reference, found, strict=True)
    return statistics.mean(
        logit_agreement(one, other, torch.ones(one.shape[:2])).kl for one, other in pairs
    )


def answers(name: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for each mode of a recipe, beside the float32 model, or the row of that one."""
    samples = load_samples(data / "test")
    processor = load_processor(EXAMPLE / "student")
    original = load_model(EXAMPLE / "student", torch.float32)

    def asked(model: Any) -> tuple[VqaReport, list[torch.Tensor]]:
        report = evaluate_vqa(model, processor, samples, blind=False)
        return report, prompt_logits(model, processor, samples[:PROMPTS])

    reference, expected = asked(original)

    def row(name: str, report: VqaReport, logits: Sequence[torch.Tensor]) -> dict[str, Any]:
        pairs = zip(report.predictions, reference.predictions, strict=True)
        return {
            "model": name,
            "questions": len(report.predictions),
            "percent_right": round(100 * report.overall.accuracy, 2),
            "standard_error": round(100 * report.overall.standard_error, 2),
            "other_answers": sum(one.predicted != other.predicted for one, other in pairs),
            "kl_nats": float(f"{divergence(expected, logits):.2g}"),
        }

    if name == ORIGINAL:
        return [row(name, reference, expected)]
    recipe, rows = recipe_of(name), []
    shown = {}
    if recipe.training is not None:
        shown = {"train_data": data / "more", "teacher": EXAMPLE / "teacher"}
    elif recipe.quantizes_activations:
        shown = {"train_data": data / "train"}
    compiled = gracec.compile(EXAMPLE / "student", recipe, progress=False, **shown)
    for mode in VARIANTS[name]:
        target = folder / mode
        compiled.export_onnx(target, "qdq", mode)
        rows.append(row(f"{name}, {mode}", *asked(gracec.load(target, backend="onnx"))))
    return rows


def tower() -> PreTrainedModel:
    """A LLaVA whose tower has the width and the tokens of CLIP-B/16, random and 3 of its layers."""
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,  # the last is not used
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    }
    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
    }
    model: PreTrainedModel = random_llava(vision, text)
    return model


def encoders(name: str, folder: Path) -> dict[str, Path]:
    """The vision encoder in float32 and by w8a8, its codes in 7 and in 8 bits."""
    student = name == "shipped student"
    model = load_model(EXAMPLE / "student", torch.float32) if student else tower()
    graph = capture_serving(model)[VISION]
    analyzed = run_passes(capture(model), [AnalyzeModality()]).program
    files = {}
    for name in ("float32", "w8a8", "w8a8, 8-bit codes"):
        passes: list[Pass] = []
        if name != "float32":
            plan = PlanQuantization(recipe=recipe_of(name))
            search = InsertFakeQuant(candidates=8)
            made = run_passes(analyzed, [plan, InsertObservers(), search, Freeze()])
            passes = [ApplyCodes(frozen_weights(made.program)), LowerQdq(strict=True)]
        program = run_passes(graph.program, passes).program.copy()
        drop_dead(program)
        path = folder / f"{len(files)}.onnx"
        graphs.write_model(graphs.to_onnx(replace(graph, program=program), VISION), path)
        files[name] = path
    return files


def speed(name: str, folder: Path) -> list[dict[str, Any]]:
    """Time the variants in turn and compare those of one round."""
    files = encoders(name, folder)
    options = {"session.intra_op.allow_spinning": "0"}
    sessions = {one: open_session(path, options, threads=1) for one, path in files.items()}
    x = np.random.default_rng(0).standard_normal(
        (1, 3, TOWERS[name], TOWERS[name]), dtype=np.float32
    )
    seconds: dict[str, list[float]] = {one: [] for one in files}
    for _ in range(ROUNDS + 2):
        for one, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"pixel_values": x})
            seconds[one].append(time.perf_counter() - start)
    rows = []
    base = seconds["float32"][2:]
    for one in files:
        ratios = sorted(a / b for a, b in zip(base, seconds[one][2:], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            {
                "vision_encoder": name,
                "weights": one,
                "milliseconds_median": round(1e3 * statistics.median(seconds[one][2:]), 2),
                "times_float32": round(statistics.median(ratios), 2),
                "middle_half": f"{ratios[quarter]:.2f} to {ratios[-quarter - 1]:.2f}",
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=300, help="of the test split")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each in a process")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        if options.row is not None:
            towers = options.row in TOWERS
            place = Path(folder)
            rows = (
                speed(options.row, place) if towers else answers(options.row, options.data, place)
            )
            print(json.dumps(rows))
            return
        written = {
            "test": ("test", options.questions),
            "train": ("train", CALIBRATION),
            "more": ("train", TRAINING_QUESTIONS),
        }
        for name, (split, limit) in written.items():
            write_questions(EXAMPLE, split, Path(folder) / name, limit)

        def found(name: str) -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = in_a_process(__file__, {"row": name, "data": folder})
            print(rows, file=sys.stderr, flush=True)
            return rows

        with ThreadPoolExecutor(options.jobs) as pool:
            parts = list(pool.map(found, [*VARIANTS, *TOWERS]))
    rows = [row for part in parts for row in part]
    given = f"--jobs {options.jobs}" if options.jobs > 1 else ""
    what = "quantized activations, ONNX Runtime"
    write_result("activations", what, rows, arguments=given, load=load)


if __name__ == "__main__":
    main()
