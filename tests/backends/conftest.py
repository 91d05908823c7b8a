"""One export of the tiny LLaVA, and copies of it to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gracec.backends.onnx import graphs
from gracec.compiler import CompiledModel


@pytest.fixture(scope="session")
def exported(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compiled` as ONNX graphs whose tensors lie in files of their own. Not to be changed."""
    directory = tmp_path_factory.mktemp("onnx") / "exported"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "EXTERNAL_ABOVE", 40_000)
        compiled.export_onnx(directory)
    return directory


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """copied(): a copy of `exported` that a test may change."""
    return lambda: Path(shutil.copytree(exported, tmp_path / "copy"))
