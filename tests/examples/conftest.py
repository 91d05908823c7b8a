"""What the examples are tried on: a question, its picture, and the tokens that Python answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import gracec
from gracec.compiled import CompiledModel
from gracec.data.prompts import encode_questions
from gracec.demo import write_questions
from gracec.evaluate import load_image, load_samples
from gracec.recipe import OnnxDeploy
from tests.signed import negated_by_halves
from tests.tiny import IMAGE_SIZE, tiny_image

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 24


@dataclass(frozen=True)
class Asked:
    """One question and the tokens of its answer."""

    image: Path
    question: str
    tokens: list[int]


@dataclass(frozen=True)
class Tried:
    """A directory with ONNX graphs, and what ONNX Runtime answers from it in Python."""

    directory: Path
    asked: list[Asked]


def answered(directory: Path, questions: Sequence[tuple[Path, str]]) -> Tried:
    model = gracec.load(directory, backend="onnx")
    asked = []
    for image, question in questions:
        inputs = encode_questions(model.processor, [question], [load_image(image)])
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        asked.append(Asked(image, question, tokens[0, inputs["input_ids"].shape[1] :].tolist()))
    return Tried(directory, asked)


@pytest.fixture(scope="session")
def tiny(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    """Random weights: long answers without meaning, another for each picture."""
    folder = tmp_path_factory.mktemp("pictures")
    questions = []
    for seed, question in enumerate(["what is this ?", "where is the small red circle ?"] * 2):
        image = folder / f"{seed}.png"
        tiny_image(seed, (IMAGE_SIZE, IMAGE_SIZE)).save(image)
        questions.append((image, question))
    return answered(bundle, questions)


@pytest.fixture(scope="session")
def signed(tiny: Tried, compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    """The questions of `tiny` for weights half of whose scales are negative."""
    weights = {fqn: negated_by_halves(weight) for fqn, weight in compiled.weights.items()}
    exact = OnnxDeploy(mode="faithful")  # so that no answer is one of two nearly equal ones
    frozen = replace(compiled.frozen, weights=weights, reference=None, onnx=exact)
    place = tmp_path_factory.mktemp("signed") / "model"
    CompiledModel(frozen, compiled.runtime, compiled.report).save_pretrained(place, "hf,onnx")
    return answered(place, [(one.image, one.question) for one in tiny.asked])


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    """The shipped student and questions of its task."""
    folder = tmp_path_factory.mktemp("student")
    write_questions(ROOT / "examples/emojivqa", "test", folder / "data", 20)
    compiled = gracec.compile(ROOT / "examples/emojivqa/student", "w4a16-ptq")
    compiled.save_pretrained(folder / "model", "hf,onnx")
    samples = load_samples(folder / "data")
    return answered(folder / "model", [(sample.image, sample.question) for sample in samples])
