"""The tests with the oldest and with the newest packages that gracec allows: `make test-versions`.

Each session installs the pins of `tests/versions/<session>.txt`, runs what is not marked slow, and
writes what it ran with and what came out into `docs/results/versions.json`, passed or not; then
`python docs/make_pages.py` writes the table of docs/versions.md.

    nox -s lowest                     one of the two
    nox -s lowest -- tests/passes     some of the tests; the file says which
    nox -R                            as it is installed from the last time
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "docs/results/versions.json"

nox.options.default_venv_backend = "venv"


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The lower bounds of pyproject.toml."""
    run(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest packages there were when the pins were written."""
    run(session)


def run(session: nox.Session) -> None:
    """Install the pins of a session and gracec beside them, run the tests, keep what came out."""
    name = session.name.split("-")[0]
    extra = os.environ.get("PIP_ARGS", "").split()
    # Together, so that pip refuses pins that gracec's own requirements do not allow.
    session.install(*extra, "-r", f"tests/versions/{name}.txt", "-e", ".")
    report = Path(session.create_tmp()).resolve() / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = session.posargs or ["tests"]
    workers = ["-n", os.environ.get("WORKERS", "auto"), "--maxprocesses", "8", "--timeout", "1200"]
    # It holds what is committed to the pins, which is what is about to be written.
    itself = "--deselect=tests/test_requirements.py::test_the_committed_results_are_of_the_pins"
    options = ["-m", "not slow", itself, *workers, f"--junitxml={report}"]
    session.run(
        *("python", "-m", "pytest", *options, *chosen),
        env={"OMP_NUM_THREADS": "1"},
        success_codes=[0, 1],
    )
    printed = session.run("python", "-m", "pip", "list", "--format=json", silent=True, log=False)
    installed = {canonical(p["name"]): p["version"] for p in json.loads(str(printed))}
    result = {
        "python": str(session.run("python", "-V", silent=True, log=False)).split()[1],
        "tests": f"{' '.join(chosen)}, without those marked slow",
        **counts(report),
        "packages": {package: installed[package] for package in sorted(requirements())},
    }
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    text = json.dumps({**kept, name: result}, indent=1, sort_keys=True)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    if result["failed"]:
        session.error(f"{result['failed']} tests failed: {', '.join(result['failures'])}")


def counts(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, which failed, and why some were skipped."""
    passed, failures = 0, []
    reasons: dict[str, int] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            why = str(skipped.get("message"))
            reasons[why] = reasons.get(why, 0) + 1
        else:
            passed += 1
    return {
        "passed": passed,
        "failed": len(failures),
        "skipped": sum(reasons.values()),
        "failures": failures,
        "skipped_because": reasons,
    }


def requirements() -> set[str]:
    """The packages that gracec itself requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = (re.match(r"[\w-]+", line) for line in project["dependencies"])
    return {canonical(name.group()) for name in names if name}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")
