"""Versions that gracec refuses, and that what is written about versions agrees."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gracec import _requirements
from gracec._requirements import SUPPORTED, check_versions
from gracec.errors import GracecError, GracecWarning

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/versions.json"


def required() -> dict[str, Requirement]:
    """What pyproject.toml says."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins(name: str) -> dict[str, Version]:
    """Those of gracec's own requirements, without the tools of the tests."""
    text = (ROOT / f"tests/versions/{name}.txt").read_text(encoding="utf-8")
    lines = text.split("# ---")[0].splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in pairs}


Install = Callable[[str], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("5.12.0"): transformers has that version, whatever it has."""

    def pretend(version: str) -> None:
        def found(package: str) -> str:
            return version if package == "transformers" else metadata.version(package)

        monkeypatch.setattr(_requirements, "version", found)

    return pretend


@pytest.mark.parametrize("version", ["5.18.0", "4.57.6", "5.9.0", "5.18.0.dev0"])
def test_what_is_too_old_is_refused(version: str, install: Install) -> None:
    install(version)
    message = (
        rf"^transformers {version} is installed, gracec needs 5.21 or newer; pip install '.*'$"
    )
    with pytest.raises(GracecError, match=message):
        check_versions()


@pytest.mark.parametrize("version", ["5.21.0", "5.24.0", "5.100.1"])
@pytest.mark.filterwarnings("error")
def test_what_is_supported_is_used(version: str, install: Install) -> None:
    install(version)
    check_versions()


def test_what_is_newer_than_was_tried_is_used_with_a_warning(install: Install) -> None:
    install("6.0.0")
    with pytest.warns(GracecWarning, match="transformers 6.0.0 is newer than"):
        check_versions()


def test_the_import_and_the_command_refuse_in_one_line(tmp_path: Path) -> None:
    """With an old torch, as far as pip can tell; nothing of torch is imported before."""
    written = tmp_path / "torch-2.9.1.dist-info/METADATA"
    written.parent.mkdir()
    written.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n", encoding="utf-8")
    start = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
    message = (
        "torch 2.9.1 is installed, gracec needs 2.11 or newer; pip install 'torch>=2.11,<2.16'"
    )

    def stderr(script: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", start + script], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    code, printed = stderr("import gracec")
    assert code == 1
    assert printed.splitlines()[-1] == f"gracec.errors.GracecError: {message}"
    command = "sys.argv[0] = '/usr/bin/gracec'; from gracec.cli import main; main()"
    assert stderr(command) == (2, f"gracec: {message}\n")


def test_pyproject_has_the_same_range() -> None:
    for package, (oldest, beyond) in SUPPORTED.items():
        assert required()[package].specifier == Requirement(f"x>={oldest},<{beyond}").specifier


def test_the_lowest_pins_are_the_lower_bounds() -> None:
    bounds = {
        package: Version(re.search(r">=([\d.]+)", str(requirement.specifier))[1])  # type: ignore[index]
        for package, requirement in required().items()
    }
    assert pins("lowest") == bounds


def test_the_newest_pins_are_allowed() -> None:
    newest, needed = pins("newest"), required()
    assert newest.keys() == needed.keys()
    for package, version in newest.items():
        assert needed[package].specifier.contains(version), package


@pytest.mark.parametrize("name", ["lowest", "newest"])
def test_the_committed_results_are_of_the_pins(name: str) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))[name]
    assert {package: Version(v) for package, v in found["packages"].items()} == pins(name)
    assert (found["failed"], found["failures"]) == (0, [])
    assert found["passed"] > 0
