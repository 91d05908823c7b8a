"""onnxruntime-genai in a process of its own: it may end the process that gives it a bad picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import gracec
from gracec.evaluate import load_image

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
NEW_TOKENS = 12
Question = tuple[str, list[Path]]
"""A prompt and its pictures."""

SCRIPT = """
import json, sys
import onnxruntime_genai as og

model = og.Model(sys.argv[1])
processor = model.create_multimodal_processor()
answers = []
for prompt, pictures in json.load(sys.stdin):
    inputs = processor(prompt, images=og.Images.open(*pictures) if pictures else None)
    length = inputs["input_ids"].shape()[1]
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=length + int(sys.argv[2]))
    generator = og.Generator(model, params)
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    names = ["pixel_values", "image_grid_thw"] if pictures else []
    answers.append({name: inputs[name].as_numpy().tolist() for name in names})
    answers[-1]["prompt"] = inputs["input_ids"].as_numpy()[0].tolist()
    answers[-1]["answer"] = list(map(int, generator.get_sequence(0)))[length:]
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """What a client made of a question; lists are what the tensors hold."""

    prompt: list[int]
    answer: list[int]
    pixel_values: list[list[float]] | None = None
    image_grid_thw: list[list[int]] | None = None


def needed() -> None:
    """Skip a test where onnxruntime-genai is not installed."""
    if find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed")


def run(script: str, *arguments: object, lines: str = "", cwd: Path | None = None) -> str:
    """What a script printed; it has to end well."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        command,
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(directory: Path, questions: Sequence[Question]) -> list[Answer]:
    """What onnxruntime-genai answers, greedily."""
    lines = json.dumps([(prompt, list(map(str, pictures))) for prompt, pictures in questions])
    return [
        Answer(**fields) for fields in json.loads(run(SCRIPT, directory, NEW_TOKENS, lines=lines))
    ]


def expected(directory: Path, questions: Sequence[Question]) -> list[Answer]:
    """What gracec answers from the same directory with ONNX Runtime; genai drops the end."""
    model = gracec.load(directory, backend="onnx")
    found = []
    for prompt, pictures in questions:
        images = {"images": [load_image(picture) for picture in pictures]} if pictures else {}
        inputs = model.processor(text=[prompt], **images, return_tensors="pt")
        given = inputs["input_ids"][0].tolist()
        answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, len(given) :].tolist()
        if answer[-1] == model.generation_config.eos_token_id:
            answer.pop()
        seen = {n: inputs[n].tolist() for n in ("pixel_values", "image_grid_thw") if pictures}
        found.append(Answer(given, answer, **seen))
    return found


def why_not(model_type: str, folder: Path) -> str:
    """What onnxruntime-genai says about a directory of a type, which holds nothing else."""
    fields = {"model": {"type": model_type, "context_length": 8, "decoder": {}}}
    (folder / "genai_config.json").write_text(json.dumps(fields))
    script = """
import sys
import onnxruntime_genai as og
try:
    og.Model(sys.argv[1])
except RuntimeError as error:
    print(error)
"""
    return run(script, folder)
