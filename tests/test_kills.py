"""The script that kills at random: what it counts, and that a few kills hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kills() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import kills

        yield kills
        for name in ("kills", "measure"):
            sys.modules.pop(name, None)


def test_the_results_are_a_hundred_kills_that_all_held(kills: Any) -> None:
    rows = json.loads((ROOT / "benchmarks/results/kills.json").read_text())["rows"]
    assert [row["what"] for row in rows] == list(kills.JOBS)
    assert sum(row["kills"] for row in rows) == 100
    for row in rows:
        assert [row[name] for name in kills.ALWAYS] == [row["kills"]] * len(kills.ALWAYS)


def test_a_file_that_is_gone_or_left_is_seen(kills: Any, tmp_path: Path) -> None:
    trial = kills.Trial("training", tmp_path)
    trial.put("notes.txt")
    trial.put("out.training/mine.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").write_text("1")
    before = trial.result()
    assert (trial.gone(), trial.unexpected(), trial.left()) == ([], [], [])
    (tmp_path / "notes.txt").write_text("other")
    (tmp_path / "out.training" / "mine.txt").unlink()
    assert trial.gone() == ["notes.txt", "out.training/mine.txt"]
    (tmp_path / ".out.gracec" / "new").mkdir(parents=True)
    assert trial.left() == [tmp_path / ".out.gracec" / "new"]
    assert trial.unexpected() == [".out.gracec", ".out.gracec/new"]
    (tmp_path / "out" / "model").write_text("2")
    assert trial.result() != before


@pytest.mark.slow
def test_a_few_kills_hold(kills: Any, tmp_path: Path) -> None:
    rows = kills.measure(6, 5, tmp_path)
    assert [row["kills"] for row in rows] == [2, 1, 2, 1]
    for row in rows:
        assert row["points"] >= 5
        assert [row[name] for name in kills.ALWAYS] == [row["kills"]] * len(kills.ALWAYS)
