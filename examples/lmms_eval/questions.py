"""What emojivqa.yaml needs: where the questions are, their pictures, and the score of an answer."""

import os
from pathlib import Path
from typing import Any

from PIL import Image

from gracec.data.questions import DEFAULT_TYPE, SAMPLES_FILE, image_path
from gracec.errors import GracecError
from gracec.evaluate import load_image
from gracec.evaluate.scores import normalise_answer

VARIABLE = "GRACEC_QUESTIONS"


def folder() -> Path:
    """The folder that holds samples.jsonl and its images."""
    path = Path(os.environ.get(VARIABLE, ""))
    if VARIABLE not in os.environ or not (path / SAMPLES_FILE).is_file():
        raise GracecError(
            "names no folder of questions", where=VARIABLE, fix=f"set it to one with {SAMPLES_FILE}"
        )
    return path


DATASET = {"data_files": {"test": str(folder() / SAMPLES_FILE)}}


def picture(question: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question, if it has one, in a list as lmms-eval wants it."""
    name = question.get("image")
    return [] if name is None else [load_image(image_path(folder(), name))]


def score(question: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 for a right answer, counted over all questions and over those of its type."""
    right = float(normalise_answer(answers[0]) == normalise_answer(question["answer"]))
    return {"exact_match": right, f"exact_match_{question.get('type') or DEFAULT_TYPE}": right}
