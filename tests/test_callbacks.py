"""What callbacks and trackers are told, and what they can do to a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.callbacks import Callback
from gracec.errors import GracecError
from gracec.training.trackers import TrackerCallback
from tests.tiny import tiny_processor
from tests.training.test_run import recipe, records


class Kept(GeneralTracker):
    """Keeps what it is told."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False

    @property
    def tracker(self) -> Any:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


class Log(Callback):
    """Notes what it is told, and ends or fails after a step."""

    def __init__(self, *, end: int = 0, fail: int = 0) -> None:
        self.end, self.fail = end, fail
        self.told: list[Any] = []

    def on_stage(self, name: str) -> None:
        self.told.append(name)

    def on_step(self, step: int, figures: Any) -> bool:
        assert figures["ce"] > 0 and "step" not in figures
        self.told.append(step)
        if step == self.fail:
            raise ZeroDivisionError("of a user")
        return step == self.end

    def on_evaluation(self, step: int, figures: Any) -> None:
        self.told.append(f"{step}: {sorted(figures)[-1]}")


def trained(llava: LlavaForConditionalGeneration, **options: Any) -> gracec.CompiledModel:
    return gracec.compile(
        llava,
        recipe(training={"distillation": {"kind": "none", "omega": 0}}),
        train_data=records(),
        processor=tiny_processor(),
        progress=False,
        check_reload=False,
        **options,
    )


def test_a_callback_ends_a_training_which_is_tracked(
    llava: LlavaForConditionalGeneration, caplog: pytest.LogCaptureFixture
) -> None:
    log, tracker = Log(end=3), Kept()
    with caplog.at_level(logging.INFO, "gracec"):
        compiled = trained(llava, callbacks=[log], report_to=tracker)
    steps = [one for one in log.told if isinstance(one, int)]
    assert steps == [1, 2, 3]
    stages = [one for one in log.told if isinstance(one, str) and ":" not in one]
    assert stages == "load examine prepare train freeze lower evaluate publish".split()
    evaluations = [one.partition(":")[0] for one in log.told if ":" in str(one)]
    assert evaluations[-1] == "3" and evaluations[0] == "0"
    assert compiled.report.training["steps"] == 3
    notes = list(map(str, compiled.report.notes))
    assert "training: a callback ended the training after step 3" in notes
    assert [step for step, row in tracker.rows if "ce" in row] == steps
    assert tracker.settings["lr"] == 3e-3 and tracker.finished
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("stage prepare 0.") or "stage prepare" in line for line in said)
    assert any(line.startswith("pass insert-fake-quant ") for line in said)


@pytest.mark.slow
def test_what_a_callback_raises_leaves_the_checkpoint(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    tracker, out = Kept(), tmp_path / "out"
    with pytest.raises(ZeroDivisionError, match="of a user"):
        trained(llava, callbacks=[Log(fail=3)], report_to=[tracker], output_dir=out, formats=())
    assert tracker.finished
    log = Log()
    compiled = trained(llava, callbacks=[log], output_dir=out, formats=(), resume=True)
    assert [one for one in log.told if isinstance(one, int)] == [3, 4]
    assert compiled.report.training["steps"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": "wandbb"}, "report_to: unknown tracker 'wandbb'; did you mean 'wandb'?"),
        (
            {"report_to": ["dvclive"]},
            "dvclive needs the package dvclive, which is not",
        ),
        ({"report_to": "tensorboard"}, "needs the package tensorboard, which is not installed"),
        (
            {"callbacks": [Log]},
            "callbacks: the class Log is no callback: an object with",
        ),
        ({"callbacks": [object()]}, "callbacks: object is no callback"),
    ],
)
def test_what_cannot_be_told_is_refused_at_once(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gracec.training.trackers.find_spec", lambda name: None)
    with pytest.raises(GracecError, match=message):
        gracec.compile("no model", "w4a16", train_data=records(), **options)


def test_a_tracker_without_a_training_would_be_ignored() -> None:
    with pytest.raises(GracecError, match="does not train, so report_to would be ignored"):
        gracec.compile("no model", "w4a16-ptq", report_to=Kept())


def test_a_tracker_that_fails_is_named(tmp_path: Path) -> None:
    class Offline(Kept):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            raise ConnectionError("no network")

    told = TrackerCallback((Offline(),), tmp_path)
    told.on_train_begin({"lr": 1.0, "distillation": {"kind": "none", "tau": None}})
    with pytest.raises(GracecError, match="report_to: tracker kept: no network; leave it out"):
        told.on_step(1, {"ce": 1.0})
    assert told.open[0].settings == {"lr": 1.0, "distillation.kind": "none"}  # type: ignore[attr-defined]
