"""The list of mutations is not stale, and the script that tries them tells kills from survivors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gracec.passes import all_passes

ROOT = Path(__file__).parents[1]
MODULES = ("mutations", "wiring", "measure")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The two scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import mutations
        import wiring

        yield SimpleNamespace(run=mutations, wiring=wiring)
        for name in MODULES:
            sys.modules.pop(name, None)


def test_every_text_is_in_its_file_once_and_leaves_it_python(bench: Any) -> None:
    every = bench.wiring.mutations()
    assert len({mutation.name for mutation in every}) == len(every)
    for mutation in every:
        changed = bench.run.mutated(ROOT, mutation)
        assert changed != (ROOT / mutation.file).read_text(encoding="utf-8"), mutation.name
        compile(changed, mutation.file, "exec")


def test_every_test_that_has_to_fail_is_there(bench: Any) -> None:
    for mutation in bench.wiring.mutations():
        for test in mutation.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name or 'test_.*'}\(", text, re.MULTILINE), test


def test_every_pass_that_ensures_something_is_in_the_list(bench: Any) -> None:
    names = {mutation.name for mutation in bench.wiring.mutations()}
    own = [cls for cls in all_passes().values() if cls.__module__.startswith("gracec.")]
    ensuring = {f"ensures of {cls.name}" for cls in own if "ensures" in vars(cls)}
    assert ensuring and ensuring == {name for name in names if name.startswith("ensures of ")}


def test_the_results_are_those_of_the_list_and_none_survived(bench: Any) -> None:
    path = ROOT / "benchmarks/results/mutations.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = [mutation.name for mutation in bench.wiring.mutations()]
    assert [row["mutation"] for row in rows] == names, "run: python benchmarks/mutations.py"
    assert [row["mutation"] for row in rows if not row["killed_by"]] == []


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A tree with a check that a test misses, and one that none does."""
    root = tmp_path / "toy"
    root.mkdir()
    (root / "toy.py").write_text(
        "def root(x):\n"
        "    if x < 0:\n"
        "        raise ValueError('negative')\n"
        "    if x == 13:\n"
        "        raise ValueError('unlucky')\n"
        "    return x ** 0.5\n"
    )
    (root / "test_toy.py").write_text(
        "import pytest\n"
        "from toy import root\n\n"
        "def test_root():\n"
        "    assert root(4) == 2\n\n"
        "def test_negative():\n"
        "    with pytest.raises(ValueError):\n"
        "        root(-1)\n\n"
        "def test_wrong():\n"
        "    assert root(4) == 3\n"
    )
    return root


RIGHT = ("test_toy.py::test_root", "test_toy.py::test_negative")


def test_kills_and_survivors(bench: Any, toy: Path) -> None:
    before = (toy / "toy.py").read_text()
    wanted = [
        bench.wiring.Mutation("negative", "toy.py", "x < 0", "False", RIGHT),
        bench.wiring.Mutation("unlucky", "toy.py", "x == 13", "False", RIGHT),
    ]
    found = list(bench.run.verdicts(toy, wanted, jobs=2))
    assert [one.mutation for one in found] == wanted
    assert [one.killed_by for one in found] == [RIGHT[1], None]
    assert found[0].row()["killed_by"] == RIGHT[1] and found[0].row()["mutation"] == "negative"
    assert (toy / "toy.py").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "x < 1"}, "negative: its text occurs 0 times in toy.py"),
        ({"text": "ValueError"}, "negative: its text occurs 2 times in toy.py"),
        ({"tests": ("test_toy.py::test_wrong",)}, "test_wrong fails without any mutation"),
        ({"tests": ("test_toy.py::test_nowhere",)}, "test_nowhere: pytest ended with 4"),
        ({"replacement": "False:\n  ("}, "test_negative: pytest ended with"),
    ],
)
def test_what_says_nothing_is_no_verdict(
    bench: Any, toy: Path, change: dict[str, Any], message: str
) -> None:
    good = bench.wiring.Mutation("negative", "toy.py", "x < 0", "False", RIGHT[1:])
    with pytest.raises(bench.run.Unclear, match=message):
        list(bench.run.verdicts(toy, [replace(good, **change)]))
