"""examine: the questions that a model is asked before and after it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gracec import gates
from gracec.errors import GateError
from gracec.evaluate import VqaReport, accuracy_rows, evaluate_vqa, paired_difference
from gracec.request import Request
from gracec.stages.source import Source

SURE = 2
"""Standard errors that a loss of accuracy has to be larger than, to be hardly chance."""


@dataclass(frozen=True)
class Exam:
    """What the original answered; None where there are no questions.

    Attributes:
        accuracy: scores of both models and their difference, once the second was asked.
        failure: why the accuracy is not as the recipe expects, or None.
        after: what the compiled model answered, once it was asked.
    """

    before: VqaReport | None
    accuracy: dict[str, Any]
    failure: GateError | None = None
    after: VqaReport | None = None

    @property
    def lost(self) -> bool:
        """Whether the compiled model answers worse than it should, or clearly worse than the
        original."""
        if self.before is None or self.after is None:
            return False
        return self.failure is not None or bool(loss(self.after, self.before))


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
    return examined(exam.before, evaluate_vqa(runtime, processor, request.questions), request)


def examined(before: VqaReport, found: VqaReport, request: Request) -> Exam:
    """Hold answers to those of the original, and to what the recipe expects."""
    accuracy = accuracy_rows(before, found, request.data_name)
    failure = None
    if request.recipe.expect is not None:
        try:
            gates.accuracy_is_as_expected(accuracy, request.recipe.expect)
        except GateError as error:
            failure = error
    return Exam(before, accuracy, failure, found)


def rounding_cost(exam: Exam, request: Request, processor: Any, model: Any) -> str:
    """Why a model that rounds more than the compiled one answers too badly, or "".

    Raises:
        GracecError: if it cannot be asked.
    """
    assert exam.before is not None
    found = evaluate_vqa(model, processor, request.questions, blind=False)
    return cost_of_rounding(examined(exam.before, found, request), exam)


def cost_of_rounding(rounded: Exam, exact: Exam) -> str:
    """Why rounding costs too much accuracy (half a sentence), or "".

    It does where fewer questions are answered right by more than twice the standard error of the
    difference, over the same questions; or where the recipe expects more, and would get it.
    """
    assert rounded.after is not None and exact.after is not None
    if rounded.failure is not None and exact.failure is None:
        return str(rounded.failure)
    return loss(rounded.after, exact.after)


def loss(found: VqaReport, other: VqaReport) -> str:
    """How much worse one model answers than another, if that is hardly chance; or ""."""
    difference, error = paired_difference(found, other)
    if difference >= -SURE * error:
        return ""
    return f"accuracy is lower by {-100 * difference:.1f} ±{100 * error:.1f} points"
