"""Errors that a user of gracec can act on."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text in one line that every terminal and file takes: what is not printable is escaped.

    Names of files, keys and tokens come from others, and may hold line ends, codes of terminals or
    halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii")
        for mark in text
    )


class GracecError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    Args:
        what: what is wrong.
        where: the module path, file or field it is wrong in.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(printable(f"{message}; {fix}" if fix else message))


class GateError(GracecError):
    """A numeric gate failed: the input was fine, the result is not good enough to hand over."""


class PassError(GracecError):
    """A pass refused a program, or left one that breaks its own postcondition."""


class GracecWarning(UserWarning):
    """Something a user should know that stops nothing; the command line prints it as one line."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its type if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
