"""Accuracy of a model on question answering data, with errors and controls."""

from gracec.data.pictures import load_image
from gracec.data.questions import VqaSample, load_samples
from gracec.evaluate.ask import answer, answers, evaluate_vqa
from gracec.evaluate.chat import Chat
from gracec.evaluate.references import Reference, load_questions
from gracec.evaluate.scores import (
    Prediction,
    VqaReport,
    VqaScore,
    accuracy_rows,
    format_table,
    paired_difference,
)

__all__ = [
    "Chat",
    "Prediction",
    "Reference",
    "VqaReport",
    "VqaSample",
    "VqaScore",
    "accuracy_rows",
    "answer",
    "answers",
    "evaluate_vqa",
    "format_table",
    "load_image",
    "load_questions",
    "load_samples",
    "paired_difference",
]
