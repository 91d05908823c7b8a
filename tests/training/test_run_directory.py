"""The directory of a training: one process at a time, and what a user put there stays."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import gracec
from gracec.errors import GracecError, GracecWarning
from gracec.store import write_directory, write_store
from gracec.training import run_directory
from gracec.training.checkpoints.directory import latest_checkpoint
from gracec.training.run_directory import (
    FROZEN,
    LOCK,
    METRICS,
    alone_in,
    foreign_to_run,
    kept_of_user,
    open_run,
    remove_run,
)
from tests.children import start, wait
from tests.test_store import example, snapshot
from tests.tiny import tiny_llava
from tests.training.test_checkpoints import Trainer
from tests.training.test_run import compile_until_killed, options


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that was interrupted after its last step."""
    found = tmp_path / "out.training"
    trainer = Trainer()
    for _ in range(2):
        trainer.train(1).save(found)
    for name in (METRICS, "events.out.tfevents.17.host.1.0"):
        (found / name).write_text("{}\n")
    write_directory(found / FROZEN, lambda target: write_store(example(), target))
    return found


def test_all_that_gracec_wrote_goes(run: Path) -> None:
    (run / ".step-00000009.removed").mkdir()
    (run / ".step-00000003.gracec" / "new").mkdir(parents=True)
    (run / ".frozen.gracec" / "new").mkdir(parents=True)
    with alone_in(run):
        assert foreign_to_run(run) == [] == kept_of_user(run)
        notes = open_run(run, resume=True)
        assert [str(run / name) in note for name, note in zip(LEFT, notes, strict=True)]
        remove_run(run)
    assert not run.exists()


LEFT = (".step-00000003.gracec/new", ".step-00000009.removed", ".frozen.gracec/new")


def test_files_of_a_user_stay_wherever_they_are(run: Path) -> None:
    mine = ["notes.txt", "plots/loss.png", "step-00000001/why.txt", "frozen/mine.txt"]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    (run / "step-1").mkdir()
    foreign = ["frozen/mine.txt", "notes.txt", "plots", "step-00000001/why.txt", "step-1"]
    assert foreign_to_run(run) == foreign
    assert kept_of_user(run) == [f"{run} stays, for {', '.join(foreign[:3])} and 2 more in it"]
    with alone_in(run):
        assert open_run(run, resume=True) == []
        remove_run(run)
    assert snapshot(run) == {name: name.encode() for name in mine}
    assert (run / "step-1").is_dir()
    assert latest_checkpoint(run) is None  # without a word of a damaged one


def test_an_old_checkpoint_that_holds_a_file_of_a_user_goes_without_it(run: Path) -> None:
    (run / "step-00000001" / "why.txt").write_text("mine")
    trainer = Trainer.resumed(run)
    for _ in range(2):
        trainer.train(1).save(run)
    assert snapshot(run / "step-00000001") == {"why.txt": b"mine"}
    assert latest_checkpoint(run) == run / "step-00000004"


def test_a_folder_of_somebody_else_is_no_run(tmp_path: Path) -> None:
    assert open_run(tmp_path / "none", resume=True) == []
    (tmp_path / LOCK).touch()  # of a process that was killed before anything else
    assert open_run(tmp_path, resume=False) == []
    (tmp_path / METRICS).touch()  # before its first checkpoint
    assert open_run(tmp_path, resume=True) == []
    with pytest.raises(GracecError, match="an earlier run was interrupted here; go on with"):
        open_run(tmp_path, resume=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(GracecError, match=r"no run was interrupted .*holds notes\.txt; move"):
        open_run(tmp_path, resume=True)
    with pytest.raises(GracecError, match=r"where checkpoints go, and holds notes\.txt; move"):
        open_run(tmp_path, resume=False)


def test_what_cannot_be_removed_is_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(run_directory, "remove", refuse)
    with pytest.warns(GracecWarning, match="cannot be removed: Operation not permitted"):
        remove_run(run)


def hold(directory: Path) -> None:
    with alone_in(directory):
        (directory / "there").touch()
        while not (directory / "go").exists():
            time.sleep(0.01)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(hold, run)
    while not (run / "there").exists():
        time.sleep(0.01)
    busy = f"{run}: another process is training here; wait"
    with pytest.raises(GracecError, match=busy), alone_in(run):
        raise AssertionError
    (run / "go").touch()
    assert wait(child) == 0
    with alone_in(run):
        assert (run / LOCK).exists()
    assert {path.name for path in run.iterdir()} == {"there", "go"}
    with alone_in(None):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(GracecError, match="file: cannot be written: "), alone_in(tmp_path / "file"):
        pass


def test_only_the_first_of_several_ranks_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in ("1", "0"):
        monkeypatch.setenv("RANK", number)
        with alone_in(tmp_path / "run"):
            assert (tmp_path / "run").is_dir() == (number == "0")


def compiled(directory: Path, **more: Any) -> gracec.CompiledModel:
    return gracec.compile(tiny_llava(tie=True), output_dir=directory, **(options() | more))


def test_a_folder_with_notes_alone_is_not_trained_in(tmp_path: Path) -> None:
    notes = tmp_path / "out.training" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for resume in (True, False):
        with pytest.raises(GracecError, match=r"out\.training: .*notes\.txt; move that elsewhere"):
            compiled(tmp_path / "out", resume=resume)
    assert snapshot(tmp_path) == {"out.training/notes.txt": b"mine"}


def test_of_two_that_resume_the_second_says_so(run: Path) -> None:
    before = snapshot(run)
    with alone_in(run), pytest.raises(GracecError, match="another process is training here"):
        compiled(run.with_name("out"), resume=True)
    assert snapshot(run) == before


@pytest.mark.slow
def test_notes_in_a_training_that_goes_on_stay(tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "out.training"
    assert wait(start(compile_until_killed, out))
    (run / "notes.txt").write_text("mine")
    report = compiled(out, resume=True).report
    assert f"training: {run} stays, for notes.txt in it" in map(str, report.notes)
    assert snapshot(run) == {"notes.txt": b"mine"}
    assert gracec.load(out).report == report
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.training"}
