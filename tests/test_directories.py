"""Directories and files that are written whole or not at all, beside others who write there too."""

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gracec import directories, renames
from gracec.directories import (
    MANIFEST,
    clear_leftovers,
    foreign_files,
    room_beside,
    unused,
    write_directory,
    write_file,
)
from gracec.errors import GracecError, GracecWarning
from gracec.store import read_store, write_store
from tests.children import in_a_child, start, wait
from tests.test_store import example, snapshot


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "part").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(GracecError, match="a: cannot be written: No space left on device"):
        write_directory(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []


def save_with_small_files(directory: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(GracecError, match="a: cannot be written: .*File too large"):
        write_directory(directory, lambda target: write_store(example(), target), overwrite=True)


def test_a_full_disk_is_one_line_and_the_old_artifact_stays(tmp_path: Path) -> None:
    """A real limit of the system, on the size of files, reached inside of safetensors."""
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    before = snapshot(tmp_path / "a")
    assert in_a_child(save_with_small_files, tmp_path / "a") == 0
    assert snapshot(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


POINTS = ["created", "filled", "flushed", "exchanged", "in place", "cleaned"]


def save_until(point: str, kill: bool, directory: Path) -> None:
    def reached(name: str) -> None:
        with (directory / "points").open("a") as file:
            file.write(f"{name}\n")
        if name == point and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == point:
            raise KeyboardInterrupt

    directories.reached = reached
    with pytest.raises(KeyboardInterrupt):
        write_directory(
            directory / "a", lambda target: write_store(example(1), target), overwrite=True
        )


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kill", [True, False])
def test_an_interrupted_save_leaves_a_whole_artifact(
    point: str, kill: bool, tmp_path: Path
) -> None:
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    write_directory(tmp_path / "new", lambda target: write_store(example(1), target))
    old, new = snapshot(tmp_path / "a"), snapshot(tmp_path / "new")
    assert in_a_child(save_until, point, kill, tmp_path) == (signal.SIGKILL if kill else 0)
    passed = tmp_path / "points"
    assert passed.read_text().splitlines() == POINTS[: POINTS.index(point) + 1]
    in_place = POINTS.index(point) >= POINTS.index("exchanged")
    assert snapshot(tmp_path / "a") == (new if in_place else old)
    assert len(read_store(tmp_path / "a").weights) == 3
    if not kill:
        assert {path.name for path in tmp_path.iterdir()} == {"a", "new", "points"}


def test_saving_again_replaces_the_artifact_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_directory(target, lambda directory: write_store(example(), directory))
    write_directory(target, lambda directory: write_store(example(1), directory), overwrite=True)
    found = read_store(target).weights["layer4.weight"]
    assert torch.equal(found.codes, example(1).weights["layer4.weight"].codes)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_that_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    with pytest.raises(GracecError, match="the output directory exists"):
        write_directory(tmp_path / "a", lambda target: None)
    with pytest.raises(GracecError, match="only a gracec artifact is overwritten"):
        write_directory(tmp_path / "a", lambda target: None, overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years"


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GracecError, match="cannot be written: "):
        write_directory(tmp_path / "file" / "a", lambda target: None)


def wait_for_a_file(point: str, directory: Path, kill: bool = False) -> None:
    """Save, and stop at a point: say so, then go on as soon as there is a file `go`, or never."""

    def reached(name: str) -> None:
        if name == point:
            (directory / "there").touch()
            while not (directory / "go").exists():
                signal.pause() if kill else time.sleep(0.01)

    directories.reached = reached
    write_directory(directory / "a", lambda target: write_store(example(1), target))


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.mark.parametrize("supported", [True, False])
def test_what_came_meanwhile_is_not_replaced(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of somebody else appears after the first check."""

    def reached(name: str) -> None:
        if name == "flushed":
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "thesis.tex").write_text("years")

    monkeypatch.setattr(directories, "reached", reached)
    if not supported:
        without_renameat2(monkeypatch)
    with pytest.raises(GracecError, match="a: the output directory exists|File exists"):
        write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    assert snapshot(tmp_path) == {"a/thesis.tex": b"years"}


def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(renames, "_renameat2", refuse)


def test_a_system_that_cannot_rename_without_replacing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_renameat2(monkeypatch)
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    before = snapshot(tmp_path / "a")
    with pytest.raises(GracecError, match="cannot exchange two directories in one step"):
        write_directory(
            tmp_path / "a", lambda target: write_store(example(1), target), overwrite=True
        )
    assert snapshot(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_took_the_place_of_an_artifact_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the exchange."""
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    rename = os.rename

    def then_swap(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == "replaced":
            rename(tmp_path / "a", tmp_path / "elsewhere")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "thesis.tex").write_text("years")

    monkeypatch.setattr(os, "rename", then_swap)
    with pytest.raises(GracecError, match="a: only a gracec artifact is overwritten"):
        write_directory(
            tmp_path / "a", lambda target: write_store(example(1), target), overwrite=True
        )
    assert snapshot(tmp_path / "a") == {"thesis.tex": b"years"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "elsewhere"}


def test_of_two_processes_that_write_one_directory_the_second_says_so(tmp_path: Path) -> None:
    child = start(wait_for_a_file, "filled", tmp_path)
    until((tmp_path / "there").exists)
    with pytest.raises(GracecError, match="a: another process is writing it"):
        write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    assert clear_leftovers(tmp_path / "a") == []
    (tmp_path / "go").touch()
    assert wait(child) == 0
    assert torch.equal(
        read_store(tmp_path / "a").weights["layer4.weight"].codes,
        example(1).weights["layer4.weight"].codes,
    )
    with pytest.raises(GracecError, match="a: the output directory exists"):
        write_directory(tmp_path / "a", lambda target: write_store(example(), target))


@pytest.mark.parametrize("told", [True, False])
def test_what_a_killed_process_left_is_named_and_removed(told: bool, tmp_path: Path) -> None:
    child = start(wait_for_a_file, "flushed", tmp_path, True)
    until((tmp_path / "there").exists)
    assert clear_leftovers(tmp_path / "a") == []  # it lives
    os.kill(child.pid or 0, signal.SIGKILL)
    assert wait(child) == signal.SIGKILL
    assert (tmp_path / ".a.gracec").is_dir()
    message = r"removed .*\.a\.gracec/new, [1-9][0-9,]+ B that a killed process left"
    if told:
        notes = clear_leftovers(tmp_path / "a")
        assert len(notes) == 1 and notes[0].startswith("removed ")
        write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    else:
        with pytest.warns(GracecWarning, match=message):
            write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "there"}
    assert clear_leftovers(tmp_path / "a") == []


def test_what_was_exchanged_and_is_no_artifact_is_kept(tmp_path: Path) -> None:
    """A process that was killed just before it would have put it back."""
    kept = tmp_path / ".a.gracec" / "replaced"
    kept.mkdir(parents=True)
    (kept / "thesis.tex").write_text("years")
    notes = clear_leftovers(tmp_path / "a")
    assert notes == [f"{kept}: another process had put this in the place; it is kept here"]
    assert (kept / "thesis.tex").read_text() == "years"


def delete_until_killed(directory: Path, count: int) -> None:
    unlink, left = Path.unlink, iter(range(count))

    def counted(self: Path, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(self, missing_ok)

    Path.unlink = counted  # type: ignore[method-assign]
    directories.remove_artifact(directory)


@pytest.mark.parametrize("count", [1, 2])
def test_an_artifact_that_is_half_deleted_is_known_and_goes(count: int, tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        (target / "config.json").write_text("{}")
        write_store(example(), target)

    replaced = tmp_path / ".a.gracec" / "replaced"
    write_directory(replaced, fill)
    assert in_a_child(delete_until_killed, replaced, count) == signal.SIGKILL
    assert len(snapshot(replaced)) == 3 - count and (replaced / MANIFEST).is_file()
    assert [note.split(",")[0] for note in clear_leftovers(tmp_path / "a")] == [
        f"removed {replaced}"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_user_keeps_an_artifact_from_being_replaced(tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        (target / "README.md").write_text("made")
        write_store(example(), target)

    write_directory(tmp_path / "a", fill)
    assert foreign_files(tmp_path / "a") == []
    (tmp_path / "a" / "README.md").write_text("edited")
    write_directory(tmp_path / "a", fill, overwrite=True)
    (tmp_path / "a" / "plots").mkdir()
    (tmp_path / "a" / "plots" / "loss.png").write_text("mine")
    with pytest.raises(GracecError, match="gracec did not write: plots/loss.png; move that"):
        write_directory(tmp_path / "a", fill, overwrite=True)
    assert (tmp_path / "a" / "plots" / "loss.png").read_text() == "mine"
    assert (tmp_path / "a" / MANIFEST).is_file()


def test_a_link_to_an_artifact_stays_a_link(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    (tmp_path / "link").symlink_to("a")
    write_directory(
        tmp_path / "link", lambda target: write_store(example(1), target), overwrite=True
    )
    assert (tmp_path / "link").is_symlink()
    assert len(read_store(tmp_path / "a").weights) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"a", "link"}


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "a\0b"])
def test_a_name_that_cannot_be_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        GracecError, match="cannot be written: (File name too long|(lstat: )?embedded null)"
    ):
        directories.check_target(tmp_path / name)


def test_a_place_that_is_not_writable_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(GracecError, match="/proc/new/a: cannot be written: "):
        directories.check_target(Path("/proc/new/a"))
    directories.check_target(tmp_path / "new" / "a")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for write in (
        lambda: write_directory(tmp_path / "a", print),
        lambda: write_file(tmp_path / "a", ""),
    ):
        with pytest.raises(GracecError, match="a: cannot be written: Read-only file system"):
            write()


def test_unused_names(tmp_path: Path) -> None:
    assert unused(tmp_path / "a.failed") == tmp_path / "a.failed"
    for name in ("a.failed", "a.failed-2"):
        (tmp_path / name).mkdir()
    assert unused(tmp_path / "a.failed") == tmp_path / "a.failed-3"


# Files


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_file(file, "one")
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    write_file(tmp_path / "link", "two \udc80")
    assert file.read_text() == "two \\udc80" and file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "link"}


def write_to_a_small_disk(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(GracecError, match="cannot be written: File too large"):
        write_file(path, "x" * 2000)


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "old")
    for name in ("a", "b"):
        assert in_a_child(write_to_a_small_disk, tmp_path / name) == 0
    assert snapshot(tmp_path) == {"a": b"old"}


def test_what_is_no_regular_file_is_written_to() -> None:
    write_file(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()
    with pytest.raises(GracecError, match="/dev/full: cannot be written: No space left"):
        write_file(Path("/dev/full"), "text")
    with pytest.raises(GracecError, match="cannot be written: Is a directory"):
        write_file(Path("/dev"), "text")


def test_a_room_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    with room_beside(tmp_path / "a") as new:
        assert list(new.iterdir()) == []
        (new / "part").write_text("x")
    assert list(tmp_path.iterdir()) == []
