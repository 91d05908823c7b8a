"""A row says what it knows, and is the same again when it is read."""

import json

import pytest

from gracec.quant import QuantSpec
from gracec.report import Report
from gracec.report.rows import PlanRow

ROW = PlanRow(("a.weight", "b.weight"), "decoder", (64, 32), QuantSpec(4, 32), "", 8192, 1088)


def test_output_errors_are_read_as_they_were_written(corrected: Report) -> None:
    rows = [row for row in corrected.plan if row.output_error is not None]
    assert len(rows) == 13 and {row.codes for row in rows} == {"corrected", "partly", "rounded"}
    for row in corrected.plan:
        saved = json.loads(json.dumps(row.to_dict(), allow_nan=False))
        assert PlanRow.from_dict(saved) == row


def test_a_row_without_them_is_as_it_was_before_there_were_any() -> None:
    saved = ROW.to_dict()
    assert not {"output_error", "codes"} & saved.keys()
    assert PlanRow.from_dict(saved) == ROW


@pytest.mark.parametrize(
    ("errors", "share"),
    [((0.02, 0.01, 0.005), 0.25), ((0.0, 0.0, 0.0), None), (None, None)],
)
def test_the_share_of_plain_rounding(
    errors: tuple[float, float, float] | None, share: float | None
) -> None:
    row = PlanRow(("a",), "decoder", (1, 1), None, "", 4, 4, output_error=errors)
    assert row.error_of_plain == share
