"""Files and directories that are written whole or not at all, and never over what a user has.

    .NAME.gracec/lock        held by the process that is writing NAME, as long as it lives
    .NAME.gracec/new         what it writes; a killed process leaves it, and the next one clears it
    .NAME.gracec/replaced    what was at NAME, between taking its place and being removed

A directory is filled beside its own place, flushed to the disk, and then takes that place in a
single step, which fails where something else has come there meanwhile. Whatever interrupts it, NAME
is the whole old artifact or the whole new one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gracec.errors import GracecError, GracecWarning
from gracec.json_files import read_json_object
from gracec.renames import exchange, rename_to_nothing

MANIFEST = "gracec.json"
"""What makes a directory a gracec artifact."""
_OWN = (MANIFEST, "report.html")
"""Names that gracec writes into an artifact and does not list in its manifest."""
_LOCK, _NEW, _REPLACED = "lock", "new", "replaced"


def reached(point: str) -> None:
    """A named point of the sequence; tests interrupt the process here."""


def is_artifact(directory: Path) -> bool:
    """Whether a directory was written by gracec."""
    return os.path.isfile(directory / MANIFEST)


def check_target(directory: Path, overwrite: bool = False) -> None:
    """Refuse to write over anything but, if `overwrite`, another artifact, or where it cannot be.

    Raises:
        GracecError: if the directory exists and may not be replaced, or its place is not writable.
    """
    try:
        os.lstat(directory)
    except (FileNotFoundError, NotADirectoryError):
        _check_writable(directory)
        return
    except (OSError, ValueError) as error:  # a name that is too long, or no name
        raise cannot_write(directory, error) from error
    if not overwrite:
        raise _exists(directory)
    if not is_artifact(directory):
        raise GracecError(
            "only a gracec artifact is overwritten, and this is none",
            where=str(directory),
            fix="choose another directory",
        )
    foreign = foreign_files(directory)
    if foreign:
        raise GracecError(
            f"it holds what gracec did not write: {listing(foreign)}",
            where=str(directory),
            fix="move that elsewhere, or choose another directory",
        )


def unused(path: Path) -> Path:
    """This path, or the first of PATH-2, PATH-3 and so on that nothing is at."""
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def foreign_files(directory: Path) -> list[str]:
    """Names of the files in an artifact that were not written with it.

    Artifacts of format versions before 5 do not say what was, and none is named.
    """
    try:
        written = read_json_object(directory / MANIFEST).get("files")
    except GracecError:
        written = None
    if not isinstance(written, dict):
        return []
    return [name for name in files_in(directory) if name not in written and name not in _OWN]


def remove_artifact(directory: Path) -> None:
    """Delete what gracec wrote into an artifact; files of somebody else stay, with their folders.

    The manifest goes last: where this is interrupted, what is left is still known.
    """
    foreign = set(foreign_files(directory))
    for name in sorted(files_in(directory), key=lambda name: name == MANIFEST):
        if name not in foreign:
            (directory / name).unlink()
    for folder, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)


def files_in(directory: Path) -> list[str]:
    """Names of all files and links below a directory, with slashes, in order."""
    found: list[str] = []
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [Path(folder, name).relative_to(directory).as_posix() for name in (*links, *files)]
    return sorted(found)


def listing(names: list[str], most: int = 3) -> str:
    """Some names in a line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write_directory(
    directory: Path, fill: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Fill a directory beside its place, then put it there in a single step.

    Args:
        overwrite: replace an artifact that is there.

    Raises:
        GracecError: if the directory may not be written, another process is writing it, or the
            disk does not take it. What was there is there still.
    """
    directory = Path(os.path.realpath(directory)) if overwrite else Path(os.path.abspath(directory))
    check_target(directory, overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with room_beside(directory) as new:
            reached("created")
            fill(new)
            reached("filled")
            for name in files_in(new):
                _flush(new / name)
            for folder, _, _ in os.walk(new):
                _flush(Path(folder))
            reached("flushed")
            _put_in_place(new, directory, overwrite)
            reached("in place")
            _flush(directory.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(directory, error) from error
    reached("cleaned")


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` at the end, unless an error is raised before.

    What UTF-8 cannot hold is written as `\\udc80`. What is there and no regular file, such as
    `/dev/stdout`, is written to as it is.

    Raises:
        GracecError: if it cannot be written; what was there is there still.
    """
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        if path.exists() and not path.is_file():
            with path.open("w", **how) as file:
                yield file
            return
        with room_beside(path) as new:
            with (new / path.name).open("w", **how) as file:
                yield file
            replace_file(new / path.name, path)
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error


def write_file(path: Path, text: str) -> None:
    """The same for a text that is there already."""
    with writing(path) as file:
        file.write(text)


def replace_file(new: Path, path: Path) -> None:
    """Put a file in its place in a single step: where `path` is a link, where that leads to.

    Raises:
        GracecError: if the system does not take it.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.is_file():
            shutil.copymode(target, new)
        _flush(new)
        os.replace(new, target)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def room_beside(path: Path) -> Iterator[Path]:
    """An empty directory on the file system of `path`, for what is going to take its place.

    It is there for one process at a time, and what is left in it at the end is removed. A warning
    names what a killed process left there.

    Raises:
        GracecError: if another process is writing `path`, or nothing can be written there.
    """
    path = Path(os.path.abspath(path))
    room, busy = _room_of(path), GracecError("another process is writing it", where=str(path))
    try:
        lock = hold(room, _LOCK, busy)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        for note in _cleared(room):
            warnings.warn(note, GracecWarning, stacklevel=4)
        new = room / _NEW
        new.mkdir()
        yield new
    finally:
        _cleared(room)
        let_go(lock)


def clear_leftovers(path: Path) -> list[str]:
    """Remove what a killed process left of writing `path`; a line for each thing that was there.

    What a living process is writing stays, and is nothing to tell.
    """
    room = _room_of(Path(os.path.abspath(path)))
    if not os.path.isdir(room):
        return []
    try:
        lock = hold(room, _LOCK, GracecError("busy"))
    except (GracecError, OSError):
        return []
    try:
        return _cleared(room)
    finally:
        let_go(lock)


def hold(folder: Path, name: str, busy: GracecError) -> FileLock:
    """Make a folder and lock the file `name` in it, until `let_go` or the end of the process.

    Raises:
        GracecError: `busy`, if another process holds it.
        OSError: if the folder cannot be written.
    """
    for attempt in range(3):
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / name, timeout=0, thread_local=False)
        try:
            lock.acquire()
            return lock
        except Timeout:
            raise busy from None
        except FileNotFoundError:  # whoever held it before removed the folder in between
            if attempt == 2:
                raise
    raise AssertionError


def let_go(lock: FileLock) -> None:
    """Remove the lock and, if nothing else is in it, its folder."""
    path = Path(lock.lock_file)
    with suppress(OSError):
        path.unlink(missing_ok=True)  # while it is held: nobody else's is removed
    lock.release()
    with suppress(OSError):
        path.parent.rmdir()


def cannot_write(path: Path, error: Exception) -> GracecError:
    """The one line for an error of the system, or of what writes files."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return GracecError(
        f"cannot be written: {reason}", where=str(path), fix="nothing was changed there"
    )


def _room_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.gracec")


def _cleared(room: Path) -> list[str]:
    """Empty a room whose lock is held, of all but what is not known to be of gracec."""
    notes: list[str] = []
    for name in (_NEW, _REPLACED):
        left = room / name
        if not os.path.lexists(left):
            continue
        names = files_in(left)
        if name == _REPLACED and names and (not is_artifact(left) or foreign_files(left)):
            notes.append(f"{left}: another process had put this in the place; it is kept here")
            continue
        size = sum(os.lstat(left / file).st_size for file in names)
        if name == _REPLACED:
            with suppress(OSError):
                remove_artifact(left)
        else:
            shutil.rmtree(left, ignore_errors=True)
        notes.append(f"removed {left}, {size:,} B that a killed process left")
    return notes


def _put_in_place(new: Path, directory: Path, overwrite: bool) -> None:
    """Rename, or exchange with the artifact that is there.

    Raises:
        GracecError: if something has come there that may not be replaced.
        OSError: if the system refuses.
    """
    try:
        rename_to_nothing(new, directory)
        return
    except FileExistsError:
        check_target(directory, overwrite)
    replaced = new.with_name(_REPLACED)
    os.rename(new, replaced)  # so that what it is after the exchange can be told from a part
    try:
        exchange(replaced, directory)
    except OSError:
        os.rename(replaced, new)
        raise
    reached("exchanged")
    try:
        check_target(replaced, overwrite)
    except GracecError:
        exchange(replaced, directory)
        os.rename(replaced, new)
        check_target(directory, overwrite)
        raise


def _flush(path: Path) -> None:
    """Have the file system write a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(directory: Path) -> GracecError:
    return GracecError("the output directory exists", where=str(directory), fix="choose another")


def _check_writable(directory: Path) -> None:
    """Refuse a place that can be seen not to take anything, before hours of work."""
    try:
        os.lstat(_room_of(directory))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise cannot_write(directory, error) from error
    parent = Path(os.path.abspath(directory)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not os.path.isdir(parent):
        raise cannot_write(directory, NotADirectoryError(0, f"{parent} is no directory"))
    try:  # what permissions allow, the file system may not
        os.rmdir(tempfile.mkdtemp(prefix=".gracec-", dir=parent))
    except OSError as error:
        raise cannot_write(directory, error) from error
