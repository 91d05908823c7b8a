"""Accuracy of a model on question answering data, with errors and controls."""

from gracec.evaluate.data import VqaSample, load_image, load_samples
from gracec.evaluate.vqa import (
    Prediction,
    VqaReport,
    VqaScore,
    accuracy_rows,
    answer,
    answers,
    evaluate_vqa,
    format_table,
    paired_difference,
)

__all__ = [
    "Prediction",
    "VqaReport",
    "VqaSample",
    "VqaScore",
    "accuracy_rows",
    "answer",
    "answers",
    "evaluate_vqa",
    "format_table",
    "load_image",
    "load_samples",
    "paired_difference",
]
