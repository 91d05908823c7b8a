"""Run the tests of all families and keep what they recorded, for the table of docs/families.md.

    python docs/families.py [FAMILY ...]      rewrites these rows of docs/results/families.json
    python docs/make_pages.py                 writes the table

A test is a column and a family a row. A cell is what the test recorded when it passed, or its
error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests/capture/test_families.py"
RESULTS = ROOT / "docs/results/families.json"
COLUMNS = {
    "test_capture": "capture",
    "test_partition": "partition",
    "test_grace_step": "GRACE step",
    "test_torchao": "torchao",
    "test_hf": "HF reload",
    "test_onnx": "ONNX",
}


class Recorder:
    """Writes the cells of a family as its tests end."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}
        if RESULTS.is_file():
            self.rows = json.loads(RESULTS.read_text(encoding="utf-8"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, family = report.nodeid.partition("::")[2].rstrip("]").partition("[")
        if test not in COLUMNS or not (report.failed or report.when == "call"):
            return
        cell = dict(report.user_properties).get("cell", "")
        if report.failed:
            crash: Any = getattr(report.longrepr, "reprcrash", None)
            cell = f"failed: {str(crash.message).splitlines()[0]}" if crash else "failed"
        self.rows.setdefault(family, {})[COLUMNS[test]] = str(cell)
        text = json.dumps(self.rows, indent=2, ensure_ascii=False)
        RESULTS.write_text(text + "\n", encoding="utf-8")


def main(families: list[str]) -> int:
    """Run the tests of these families, or of all."""
    chosen = ["-k", " or ".join(f"[{family}]" for family in families)] if families else []
    columns = [f"{TESTS}::{test}" for test in COLUMNS]
    flags = [flag for flag in sys.argv[1:] if flag.startswith("-")]
    options = ["-p", "no:logging", "-p", "no:xdist", "-q", *chosen, *flags]
    return int(pytest.main([*columns, *options], plugins=[Recorder()]))


if __name__ == "__main__":
    sys.exit(main([name for name in sys.argv[1:] if not name.startswith("-")]))
