"""A report that somebody else may have written is held to what a report can say."""

import json
from typing import Any

import pytest

from gracec.compiled import CompiledModel
from gracec.errors import GracecError
from gracec.report import Report
from gracec.report.saved import read_report


def saved(report: Report) -> Any:
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_output_errors_come_back(corrected: Report) -> None:
    found = read_report(saved(corrected), where="here")
    assert found.plan == corrected.plan and found.gates == corrected.gates
    assert found.output_error_line() == corrected.output_error_line() != ""


def test_a_report_from_before_them_is_read(compiled: CompiledModel) -> None:
    before = saved(compiled.report)
    assert not any({"output_error", "codes"} & row.keys() for row in before["plan"])
    found = read_report(before, where="here")
    assert found.plan == compiled.report.plan and found.output_error_line() == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_error": [0.1, 0.2]},
        {"output_error": [0.1, 0.2, -0.3]},
        {"output_error": [0.1, "0.2", 0.3]},
        {"output_error": [0.1, 0.2, float("nan")]},
        {"codes": "guessed"},
    ],
    ids=str,
)
def test_what_no_calibration_gives_is_refused(corrected: Report, wrong: dict[str, Any]) -> None:
    report = saved(corrected)
    report["plan"][-1] |= wrong
    with pytest.raises(GracecError, match=rf"plan\S*{next(iter(wrong))}"):
        read_report(report, where="here")
