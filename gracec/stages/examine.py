"""examine: the questions that a model is asked before and after it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gracec import gates
from gracec.errors import GateError
from gracec.evaluate import VqaReport, accuracy_rows, evaluate_vqa
from gracec.request import Request
from gracec.stages.source import Source


@dataclass(frozen=True)
class Exam:
    """What the original answered; None where there are no questions.

    Attributes:
        accuracy: scores of both models and their difference, once the second was asked.
        failure: why the accuracy is not as the recipe expects, or None.
    """

    before: VqaReport | None
    accuracy: dict[str, Any]
    failure: GateError | None = None


def examine_original(source: Source, request: Request) -> Exam:
    """Ask the original."""
    if not request.questions:
        return Exam(None, {})
    model: Any = source.model
    return Exam(evaluate_vqa(model, source.processor, request.questions), {})


def examine_compiled(exam: Exam, runtime: Any, processor: Any, request: Request) -> Exam:
    """Ask the compiled model the same, and hold it to what the recipe expects."""
    if exam.before is None:
        return exam
    found = evaluate_vqa(runtime, processor, request.questions)
    accuracy = accuracy_rows(exam.before, found, request.data_name)
    failure = None
    if request.recipe.expect is not None:
        try:
            gates.accuracy_is_as_expected(accuracy, request.recipe.expect)
        except GateError as error:
            failure = error
    return Exam(exam.before, accuracy, failure)
