"""One export of the tiny LLaVA, and copies of it to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from gracec.backends.onnx import graphs
from gracec.compiler import CompiledModel


@pytest.fixture(scope="session")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Path:
    """`compiled` as ONNX graphs whose tensors lie in files of their own. Not to be changed.

    One worker writes it for all of them: it takes as long as all tests of it together.
    """
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    directory = root / "exported"
    with FileLock(root / "exported.lock"):
        if not directory.exists():
            compiled: CompiledModel = request.getfixturevalue("compiled")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graphs, "EXTERNAL_ABOVE", 40_000)
                compiled.export_onnx(directory)
    return directory


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """copied(): a copy of `exported` that a test may change."""
    return lambda: Path(shutil.copytree(exported, tmp_path / "copy"))
