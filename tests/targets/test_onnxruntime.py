"""A model compiled for ONNX Runtime answers as the graphs of its directory do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.backends.onnx import runner
from gracec.backends.onnx.format import Onnx
from gracec.errors import GracecError
from gracec.frozen import Frozen
from gracec.journal import Note
from gracec.quant import QuantSpec
from gracec.targets.onnxruntime import OnnxRuntime
from tests.backends.artifacts import decoder_specs, random_artifact
from tests.tiny import tiny_processor

OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def test_it_is_compiled_for_onnx_runtime(
    llava: LlavaForConditionalGeneration, bundle: Path, batch: dict[str, Tensor]
) -> None:
    compiled = gracec.compile(llava, "w4a16-ptq", target="onnxruntime", processor=tiny_processor())
    assert any("matmuls on INT4 kernels" in note.text for note in compiled.report.notes)
    figure = compiled.report.gates["logits"]
    assert figure.kl < figure.bound  # type: ignore[attr-defined]
    assert compiled.dtype == torch.float32 and compiled.device.type == "cpu"
    tokens = compiled.generate(**batch, **OPTIONS)
    assert torch.equal(
        tokens, gracec.load(bundle, target="onnxruntime").generate(**batch, **OPTIONS)
    )
    assert compiled(**batch).logits.shape == (*batch["input_ids"].shape, 128)
    with pytest.raises(GracecError, match="OnnxModel has no program; compile for target torchao"):
        _ = compiled.program


class Opened:
    """Stands in for a model whose graphs are run."""

    def __init__(self, folder: Path, *more: Any) -> None:
        self.folder, self.written = folder, sorted(path.name for path in folder.iterdir())


def test_what_the_format_says_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(form: Onnx, frozen: Frozen, folder: Path) -> tuple[str, ...]:
        (folder / "graph.onnx").touch()
        return ("14 matmuls on INT4 kernels", "5 norms")

    monkeypatch.setattr(Onnx, "write", write)
    monkeypatch.setattr(runner, "OnnxModel", Opened)
    frozen = random_artifact(decoder_specs(QuantSpec(4, 32)))
    model: Any
    model, notes = OnnxRuntime().lower(frozen)
    assert notes == [Note("onnx", "14 matmuls on INT4 kernels"), Note("onnx", "5 norms")]
    assert model.written == ["graph.onnx"]
    folder = model.folder
    del model
    assert not folder.exists()  # it is temporary
