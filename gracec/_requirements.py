"""Which versions of its libraries gracec runs with, looked at when it is imported."""

from __future__ import annotations

import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gracec.errors import GracecError, GracecWarning

SUPPORTED = {
    "torch": ("2.11", "2.16"),
    "torchao": ("0.17", "0.19"),
    "transformers": ("5.21", "6"),
}
"""Package -> the oldest version, and the first that is too new; as in pyproject.toml."""


def check_versions() -> None:
    """Refuse what is too old, and warn of what is newer than anything that was tried.

    It reads what pip wrote beside a package and imports none. Where pip wrote nothing, as in a
    checkout on the path, nothing is known and nothing said.

    Raises:
        GracecError: if a package is older than gracec can run with.
    """
    for package, (oldest, beyond) in SUPPORTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        fix = f"pip install '{package}>={oldest},<{beyond}'"
        if _numbers(found) < _numbers(oldest):
            raise GracecError(
                f"{package} {found} is installed, gracec needs {oldest} or newer", fix=fix
            )
        if _numbers(found) >= _numbers(beyond):
            message = f"{package} {found} is newer than gracec was tried with; if it fails, {fix}"
            warnings.warn(message, GracecWarning, stacklevel=3)


def check_versions_of_command() -> None:
    """The same, with one line in the place of a traceback where the `gracec` command runs.

    What the command imports first is the package, so nothing of the command can catch it.
    """
    try:
        check_versions()
    except GracecError as error:
        if Path(sys.argv[0]).stem != "gracec":
            raise
        print(f"gracec: {error}", file=sys.stderr)
        sys.exit(2)


def _numbers(text: str) -> tuple[int, ...]:
    """2.11.0a1+cu130 -> (2, 11): what is not out yet counts as what it becomes."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
