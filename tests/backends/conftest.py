"""Copies of the exported tiny LLaVA to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """copied(): a copy of `exported` that a test may change."""
    return lambda: Path(shutil.copytree(exported, tmp_path / "copy"))
