"""The scoreboard says what the committed results say."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_page_is_written_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scoreboard

    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert page == scoreboard.scoreboard(), "run: python benchmarks/scoreboard.py"
    for name in scoreboard.TARGETS:
        assert scoreboard.command(name) in page, name
    sys.modules.pop("measure")
