"""The curve of a run: what is written step by step, and what it says at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gracec.training.curve import METRICS, Curve, Seconds, append_metrics, write_metrics


def curve(best: int = 2, skipped: int = 0, saturated: int = 0) -> Curve:
    rows: list[dict[str, Any]] = [
        {"step": step, "ce": 1.0 / step, "saturated": step <= saturated} for step in (1, 2, 3, 4)
    ]
    held_out = [{"step": step, "held_out_loss": 3.0 - step / 2} for step in (0, 2, 4)]
    return Curve(rows, held_out, best, skipped)


def test_conclusions() -> None:
    trained = "trained 4 steps; held-out loss 3.0000 before, "
    kept = f"{trained}2.0000 after step 2, which was kept"
    assert curve().conclusions(distils=True) == [kept]
    first, reason = curve(best=0).conclusions(distils=True)
    assert first == f"{trained}3.0000 after step 0, which was kept"
    assert reason == "training did not help: the weights are those from before it"
    assert curve(skipped=1, saturated=2).conclusions(distils=True) == [
        kept,
        "1 steps were skipped: their loss was not finite",
        "β stood at a bound in 50% of the steps; see tau",
    ]
    assert curve(saturated=2).conclusions(distils=False) == [kept]


def test_what_is_said_of_a_candidate() -> None:
    alone = "the calibrated post-training quantization alone: 1.5000"
    worse, better = curve(), curve()
    worse.candidate, better.candidate = {"held_out_loss": 1.5}, {"held_out_loss": 1.5}
    better.best_step = None
    assert worse.conclusions(distils=True)[1:] == [alone]
    assert better.conclusions(distils=True) == [
        "trained 4 steps; held-out loss 3.0000 before, 1.0000 after step 4",
        alone,
        "the calibrated post-training quantization was better than every trained state: kept",
    ]
    worse.candidate = {"held_out_loss": None}
    assert worse.conclusions(distils=True)[1].endswith("alone: not finite")
    assert worse.to_dict()["candidate"] == {"held_out_loss": None}
    assert better.to_dict()["best_step"] is None


def test_the_score_that_chose_is_named() -> None:
    found = curve()
    found.chosen_by = "held_out_kl"
    found.held_out = [{**row, "held_out_kl": 0.1 / (1 + row["step"])} for row in found.held_out]
    (said,) = found.conclusions(distils=True)
    kept = "0.1000 before, 0.0333 after step 2, which was kept"
    assert said == f"trained 4 steps; held-out KL to the teacher {kept}"


def test_metrics_are_the_rows(tmp_path: Path) -> None:
    whole = curve()
    for row in whole.rows:
        append_metrics(row, tmp_path / "run")
    file = tmp_path / "run" / METRICS
    written = file.read_text()
    assert [json.loads(line) for line in written.splitlines()] == whole.rows
    write_metrics(whole, tmp_path / "run")
    assert file.read_text() == written


def test_the_wait_for_samples_is_said_and_part_of_no_figure() -> None:
    found = curve()
    figures = found.to_dict()
    assert found.waiting() == "0 steps took 0.0 s, 0% of it waiting for samples"
    found.seconds += [Seconds(1.0, 0.5), Seconds(2.0, 0.25)]
    assert found.waiting() == "2 steps took 3.0 s, 25% of it waiting for samples"
    assert found.to_dict() == figures
