"""Renames of directories that replace nothing, or exchange two of them in a single step.

Linux has both in one call, `renameat2`, which Python does not.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

_NO_REPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> None:
    """Let two directories take each other's place; both paths are absolute.

    Raises:
        OSError: if the system refuses, or cannot.
    """
    try:
        _renameat2(one, other, _EXCHANGE)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise OSError(
                error.errno, "this system cannot exchange two directories in one step; remove it"
            ) from error
        raise


def rename_to_nothing(new: Path, directory: Path) -> None:
    """Rename a directory, where nothing is in its new place; both paths are absolute.

    Raises:
        FileExistsError: if something is there.
        OSError: if the system refuses.
    """
    try:
        _renameat2(new, directory, _NO_REPLACE)
        return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    directory.mkdir()  # only one process can; a rename takes the place of an empty directory only
    try:
        os.rename(new, directory)
    except BaseException:
        with suppress(OSError):
            directory.rmdir()
        raise


def _renameat2(source: Path, target: Path, flags: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD; both paths are absolute
    if call(here, os.fsencode(source), here, os.fsencode(target), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))
