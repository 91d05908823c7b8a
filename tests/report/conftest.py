"""A report of codes that were corrected, with figures that are easy to read."""

from dataclasses import replace

import pytest

from gracec.compiled import CompiledModel
from gracec.journal import Agreement
from gracec.report import Report


@pytest.fixture(scope="session")
def corrected(compiled: CompiledModel) -> Report:
    """As compiled 0.3 of the error of plain rounding, the last weight 0.9; the first not measured
    the second rounded after all, and the third partly."""
    report, number = compiled.report, 0
    rows = []
    for row in report.plan:
        if row.spec is not None:
            number += 1
            plain = number / 1000
            errors = (plain, 0.8 * plain, (0.9 if number == 14 else 0.3) * plain)
            how = {2: "rounded", 3: "partly"}.get(number, "corrected")
            row = replace(row, output_error=None if number == 1 else errors, codes=how)
        rows.append(row)
    gates = {
        **report.gates,
        "rounded_logits": Agreement(0.0493, 0.9, 0.95),
        "corrected_logits": Agreement(0.00792, 0.97, 0.99, 0.0493),
    }
    return replace(report, plan=tuple(rows), gates=gates)
