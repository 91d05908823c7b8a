"""Mutated inputs of every kind end in one line or in the same answer. `make fuzz` tries more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.groups import GROUPS, write_artifact
from tests.fuzz.run import run_group

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", GROUPS)
def test_a_mutated_input_is_refused_or_answered_alike(
    name: str,
    tmp_path: Path,
    once: Callable[[str, Callable[[Path], object]], Path],
    request: pytest.FixtureRequest,
) -> None:
    group = GROUPS[name]

    def write(folder: Path) -> None:
        folder.mkdir()
        if group.write is not write_artifact:
            group.write(folder)
            return
        for kind, fixture in (("artifact", "bundle"), ("model", "saved")):
            shutil.copytree(request.getfixturevalue(fixture), folder / kind)

    good = once(f"fuzz-{group.write.__name__}", write)
    found = run_group(name, group, good, tmp_path / "work", count=100, seed=1)
    assert found["failures"] == []
    assert found["outcomes"].get("refused", 0) > 10, "the mutations harm nothing"


def test_the_results_are_those_of_every_group() -> None:
    rows = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text())["rows"]
    assert [row["input"] for row in rows] == list(GROUPS)
    assert {row["inputs"] for row in rows} == {2000}
    assert not any(row["failures"] for row in rows)
