"""docs/objective.md: its Python, its tables and its pictures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.fences import DOCS, run_page


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    import objective_plots

    return objective_plots


def test_the_python_prints_what_the_page_says() -> None:
    run_page("objective.md")


def test_the_tables_are_up_to_date(plots: ModuleType) -> None:
    page = (DOCS / "objective.md").read_text(encoding="utf-8")
    assert plots.render(page) == page


def test_equal_code_gives_equal_pictures(plots: ModuleType, tmp_path: Path) -> None:
    plots.draw_all(tmp_path / "a")
    plots.draw_all(tmp_path / "b")
    drawn = sorted((tmp_path / "a").iterdir())
    committed = sorted((DOCS / "objective").iterdir())
    assert [file.name for file in drawn] == [file.name for file in committed]
    for file in drawn:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert b"<dc:date>" not in file.read_bytes()
