"""The script for a GPU keeps its time, says what it did not reach, and runs small without one."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
SCRIPT = str(FOLDER / "check.py")


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """Those modules of the benchmark that measure nothing by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import gpu_page
        import sections

        yield SimpleNamespace(page=gpu_page, sections=sections)
        sys.modules.pop("sections")


def test_what_fails_is_stopped_or_is_not_reached_is_said(gpu: SimpleNamespace) -> None:
    made: list[str] = []

    def works(name: str) -> Any:
        return lambda: made.append(name) or {"ms": 1.0}

    def fails() -> Any:
        raise ValueError("no kernel")

    def hangs() -> Any:
        try:
            time.sleep(30)
        except Exception:  # as a library may, around what it runs
            made.append("swallowed")

    section = gpu.sections.Section
    saved: list[int] = []
    rows = gpu.sections.run(
        [
            section("alone", 1, lambda: [("x", fails), ("y", works("y"))], begins=False),
            section("together", 1, lambda: [("make", fails), ("use", works("use"))]),
            section("slow", 1, lambda: [("a", works("a")), ("b", hangs), ("c", works("c"))]),
            section("last", 1, lambda: [("d", works("d"))]),
        ],
        seconds=1.2,
        save=lambda rows: saved.append(len(rows)),
    )
    states = {row["item"]: (row["state"], row.get("reason")) for row in rows}
    assert states.pop("b")[0] == "stopped"
    assert states == {
        "x": ("failed", "ValueError: no kernel"),
        "y": ("done", None),
        "make": ("failed", "ValueError: no kernel"),
        "use": ("not reached", "make was not done"),
        "a": ("done", None),
        "c": ("not reached", "no time was left"),
        "d": ("done", None),
    }
    assert made == ["y", "a", "d"]
    assert saved == list(range(1, 9))
    assert 0.8 < next(row for row in rows if row["item"] == "b")["seconds"] < 1.2


def test_targets_are_held_against_what_was_found(gpu: SimpleNamespace) -> None:
    found = {
        ("serving", "gates"): {"linears_saved_percent": 73.4, "model_saved_percent": 53.1},
        ("serving", "decode bf16, batch 1, eager"): {"tokens_per_second": 30.0},
        ("serving", "decode bf16, batch 1, static cache"): {"tokens_per_second": 100.0},
        ("serving", "decode int4, batch 1, static cache"): {"tokens_per_second": 320.0},
        ("serving", "decode int4, batch 8, static cache"): {"tokens_per_second": 900.0},
        ("training", "teacher's forward"): {"ms": 100.0},
        ("training", "fine-tuning"): {"ms": 200.0},
        ("training", "GRACE"): {"ms": 430.0},
    }
    rows = [{"section": s, "item": i, "figures": f} for (s, i), f in found.items()]
    held = gpu.page.against_targets(rows)
    assert [(row["found"], row["reached"]) for row in held] == [
        (3.2, "yes"),
        (73.4, "yes"),
        (53.1, "no"),
        (1.65, "no"),
    ]
    assert {row["found"] for row in gpu.page.against_targets([])} == {"not run"}


def test_without_a_gpu_nothing_is_claimed(gpu: SimpleNamespace, tmp_path: Path) -> None:
    assert gpu.page.page(tmp_path / "gpu.json").startswith("**Not run on a GPU yet.**")
    command = [sys.executable, SCRIPT, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2 and b"give --out FOLDER" in done.stderr


@pytest.mark.slow
def test_every_section_runs_small_on_the_processor(gpu: SimpleNamespace, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["state"] for row in result["measured"]} == {"done"}
    assert "not run" not in {row["found"] for row in result["rows"]}
    assert result["environment"]["small"]
    assert gpu.page.text(result) in done.stdout
