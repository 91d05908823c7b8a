"""The shipped task in memory: questions to train on, and exact answers of a model on a split."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emojivqa"
sys.path.insert(0, str(EXAMPLE))

from emojivqa.augment import restyle  # noqa: E402
from emojivqa.evaluation import exact_match  # noqa: E402
from emojivqa.models import pixels  # noqa: E402
from emojivqa.packing import arrays, questions_of  # noqa: E402
from emojivqa.questions import TYPES, Question, evaluation_questions  # noqa: E402
from emojivqa.scenes import CELLS, Scene, compose, render  # noqa: E402

SCENES = 800
"""Scenes of the validation and of the test split; a question of each type about each."""
FIRST_NEW_SCENE = 1_000_000
"""Training scenes from here on are new to the shipped models."""


def records(split: str, scenes: range, restyled: bool = False) -> list[dict[str, Any]]:
    """Five questions about each scene, as `gracec.compile` takes them.

    Args:
        restyled: draw each scene anew for every question, as the teacher saw its own.
    """
    found = []
    for index in scenes:
        drawn = render(split, index, compose(split, index))
        questions = questions_of(split, index)[: len(TYPES)]
        images = [drawn] * len(questions)
        if restyled:
            images = list(_restyled(np.stack(images), index))
        for image, question in zip(map(Image.fromarray, images), questions, strict=True):
            found.append({"image": image, "question": question.text, "answer": question.answer})
    return found


def _restyled(images: np.ndarray, seed: int) -> np.ndarray:
    """Images uint8 [B, SIZE, SIZE, 3], each in a style of its own; the caller's draws go on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = restyle(pixels(torch.from_numpy(images)))
    return values.add(1.0).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()


@cache
def split_arrays(split: str) -> dict[str, np.ndarray]:
    return arrays(split, range(SCENES))


def answers(model: nn.Module, split: str, blind: bool = False) -> Tensor:
    """Whether each question is answered exactly, bool [SCENES, types].

    Scored packed, which gives what greedy generation gives.
    """
    hits, _ = exact_match(model, split, split_arrays(split), blind=blind)
    return hits


def clusters(split: str) -> list[list[str]]:
    """What each question is about, [SCENES][types]: the concept, or the category to count."""
    return [
        [_subject(scene, question) for question in evaluation_questions(split, index)]
        for index in range(SCENES)
        for scene in [compose(split, index)]
    ]


def _subject(scene: Scene, question: Question) -> str:
    words = question.text.removesuffix(" ?").split()
    if question.type == "name":
        return question.answer
    if question.type == "category":
        concept = scene.cells[CELLS.index((words[-2], words[-1]))]
        assert concept is not None
        return concept.name
    return words[2] if question.type == "count" else " ".join(words[3:])


def state_of(compiled: Any, student: nn.Module) -> nn.Module:
    """A float32 model with the very values that a compiled one holds: codes times scales."""
    tensors = dict(compiled.model.state_dict())
    for fqn, weight in compiled.weights.items():
        tensors[fqn] = weight.dequantize(torch.float32)
    student.load_state_dict({name: t.to(torch.float32) for name, t in tensors.items()})
    return student
