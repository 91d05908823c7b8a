"""A head gets codes of the graphs' own where it is large and its precision counts for nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gracec.backends.onnx import head
from gracec.backends.onnx.format import Onnx
from gracec.backends.onnx.head import quantize_head
from gracec.backends.onnx.mode import Expected
from gracec.backends.onnx.runner import OnnxModel
from gracec.capture.serving import Serving, apply_codes, capture_serving
from gracec.capture.serving_graph import DECODER
from gracec.errors import GateError
from gracec.frozen import Frozen, build
from gracec.passes.freeze import frozen_weights
from gracec.quant import QuantSpec
from gracec.quant.frozen import code_hash
from gracec.recipe import OnnxDeploy
from tests.backends.artifacts import decoder_specs, random_artifact

HEAD = "lm_head.weight"


@pytest.fixture
def every_head_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LARGE", 0)


def graphs_of(frozen: Frozen) -> tuple[Serving, Any, Expected]:
    model = build(frozen, torch.float32)
    serving = apply_codes(capture_serving(model), frozen.weights)[0]
    return serving, model, Expected(serving, model, frozen)


def test_a_large_tied_head_is_quantized(
    tmp_path: Path, batch: dict[str, Tensor], every_head_is_large: None
) -> None:
    frozen = random_artifact(decoder_specs(QuantSpec(4, 32)), tie=True)
    *_, said, mode = Onnx().write(frozen, tmp_path)
    session = json.loads((tmp_path / "session.json").read_text())
    figures = session["gates"]
    assert session["mode"] == "fast" and mode.startswith("mode fast")
    assert session["kernels"]["decoder"] == figures["int4_kernels"] == 15
    assert figures["equal_code_hashes"] == 14, "those of the artifact"
    found = figures["head"]
    assert (found["fqn"], found["spec"]) == (HEAD, "int8/g32")
    assert 0 < found["kl"] < 1e-3 and len(found["sha256"]) == 64
    assert said.startswith(f"{HEAD} in int8/g32, codes of these graphs alone: KL ")
    assert figures["modes"]["faithful"]["logits"]["kl"] == pytest.approx(found["kl"], rel=1e-2)
    stored = Onnx().read_weights(tmp_path)
    table = frozen.others["model.language_model.embed_tokens.weight"].float()
    error = (stored[HEAD] - table).abs().max() / table.abs().max()
    assert 0 < error < 1 / 127
    model = OnnxModel(tmp_path, frozen.config)
    assert torch.equal(model.embed(torch.arange(4)[None])[0], table[:4]), "it keeps its precision"


@pytest.mark.parametrize(
    ("options", "large"),
    [({}, False), ({"head": "keep"}, True), ({"mode": "faithful"}, True)],
    ids=["small", "keep", "faithful"],
)
def test_a_head_is_kept(
    options: dict[str, Any], large: bool, monkeypatch: pytest.MonkeyPatch, kept: Any
) -> None:
    if large:
        monkeypatch.setattr(head, "LARGE", 0)
    found = quantize_head(*kept, OnnxDeploy(**options))
    assert found.serving is kept[0] and not found.figures and not found.notes


@pytest.fixture(scope="module")
def kept() -> tuple[Serving, Any, Expected]:
    return graphs_of(random_artifact(decoder_specs(QuantSpec(4, 32))))


def test_a_head_whose_precision_counts_is_kept(every_head_is_large: None) -> None:
    """One weight in each group is far above the others, and the input of none."""
    frozen = random_artifact(decoder_specs(QuantSpec(4, 32)))
    others = dict(frozen.others)
    others[HEAD] = others[HEAD].clone() * 40
    others[HEAD][:, ::32] = 4000
    norm = "model.language_model.norm.weight"
    others[norm] = others[norm].clone()
    others[norm][::32] = 0
    serving, model, expected = graphs_of(replace(frozen, others=others))
    found = quantize_head(serving, model, expected, OnnxDeploy())
    assert found.serving is serving and expected.head_logits is expected.logits
    assert "from the codes in float32" in found.figures["head"]["kept"]
    assert found.notes[0].startswith("the head keeps its precision: in int8/g32 KL ")
    with pytest.raises(GateError, match="off by KL .*use head: keep"):
        quantize_head(serving, model, expected, OnnxDeploy(head=4))


def test_bits_that_are_asked_for(kept: Any) -> None:
    found = quantize_head(*kept, OnnxDeploy(head=4, mode="faithful"))
    weight = frozen_weights(found.serving[DECODER].program)[HEAD]
    assert weight.spec == QuantSpec(4, 32)
    assert found.figures["head"]["sha256"] == code_hash(weight)
    kept[2].without_head()
