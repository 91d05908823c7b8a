"""Artifacts that earlier versions wrote, one of each format version, load and answer as they did.

`tests/artifacts` holds what gracec wrote of a tiny LLaVA before a stage was a value: codes alone
(2), with grids of inputs (3), with adapters in float (4), and ONNX graphs; and their greedy tokens.
"""

import json
from pathlib import Path

import pytest
import torch

import gracec
from gracec.inspection import inspect_artifact
from gracec.journal import Note, Unbound
from gracec.store import TENSORS, read_manifest
from tests.tiny import tiny_batch, tiny_processor

FOLDER = Path(__file__).parent / "artifacts"
TOKENS = json.loads((FOLDER / "tokens.json").read_text())
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("version", [2, 3, 4])
def test_an_artifact_of_before_answers_as_it_did(version: int) -> None:
    directory = FOLDER / str(version)
    assert read_manifest(directory).format_version == version
    loaded = gracec.load(directory)
    batch = tiny_batch(tiny_processor())
    batch["pixel_values"] = batch["pixel_values"].to(loaded.dtype)
    assert loaded.generate(**batch, **OPTIONS).tolist() == TOKENS[str(version)]
    assert any(weight.activation is not None for weight in loaded.weights.values()) == (
        version == 3
    )
    assert bool(loaded.frozen.adapters) == (version == 4)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_what_is_saved_again_has_the_same_codes(version: int, tmp_path: Path) -> None:
    loaded = gracec.load(FOLDER / str(version))
    loaded.save_pretrained(tmp_path / "again", formats=())
    old, new = FOLDER / str(version) / TENSORS, tmp_path / "again" / TENSORS
    assert old.read_bytes() == new.read_bytes()


def test_a_report_of_before_is_shown() -> None:
    report = inspect_artifact(FOLDER / "2")
    assert Note("", "freeze: 7 weights frozen to codes") in report.notes
    assert report.gates["int4_kernels"] == Unbound(7)
    assert "KL" not in str(report.gates["logits"]) and "kl" in str(report.gates["logits"])
    assert report.gates_table().row_count == len(report.gates)


def test_onnx_graphs_of_before_answer_as_they_did() -> None:
    loaded = gracec.load(FOLDER / "onnx", target="onnxruntime")
    batch = tiny_batch(tiny_processor())
    assert torch.is_tensor(batch["input_ids"])
    assert loaded.generate(**batch, **OPTIONS).tolist() == TOKENS["onnx"]
