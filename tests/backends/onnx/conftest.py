"""The exported tiny LLaVA as ONNX Runtime runs it, and what it is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gracec
from gracec.backends.onnx.runner import OnnxModel
from gracec.compiled import CompiledModel
from tests.backends.artifacts import artifact_of, dense_model


@pytest.fixture(scope="module")
def model(exported: Path) -> OnnxModel:
    return gracec.load(exported, backend="onnx")


@pytest.fixture(scope="module")
def reference(compiled: CompiledModel) -> Any:
    """The plain float32 model whose weights are codes times scales."""
    return dense_model(artifact_of(compiled), torch.float32)
