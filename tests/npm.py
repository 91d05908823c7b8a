"""The packages of an example, installed as its README says, or the reason why they are not."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock


def install(example: Path) -> None:
    """`npm ci` in an example, once for each lock file; skips the test where it cannot."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    lock, done = example / "package-lock.json", example / "node_modules/.package-lock.json"
    with FileLock(Path(tempfile.gettempdir()) / f"gracec-npm-{example.name}.lock"):
        if done.is_file() and done.stat().st_mtime >= lock.stat().st_mtime:
            return
        run = subprocess.run(
            ["npm", "ci"], cwd=example, capture_output=True, text=True, check=False
        )
        if run.returncode:
            reason = next(
                (line for line in run.stderr.splitlines() if "error" in line), "no reason"
            )
            pytest.skip(f"npm ci fails in examples/{example.name}: {reason}")
