"""The mode that graphs are written in, and what each of them is held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

import gracec
from gracec.backends.onnx.format import Onnx
from gracec.backends.onnx.mode import Expected, set_mode
from gracec.backends.onnx.session import SessionConfig
from gracec.capture.greedy import greedy, prompt_logits
from gracec.capture.serving import Serving, ServingProgram, ServingRuntime, apply_codes
from gracec.compiled import CompiledModel
from gracec.errors import GateError
from gracec.frozen import Frozen, build
from gracec.gates import LogitAgreement
from gracec.quant import QuantSpec
from gracec.quant.frozen import FrozenWeight
from tests.backends.artifacts import artifact_of, decoder_specs, random_artifact

GRAPH = "decoder_model_merged_q4.onnx"
READ_THE_NORM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def with_outliers() -> Frozen:
    """Norms put one feature in 32 a thousand times above the others. No weight looks at it, so in
    float it changes nothing; 8 bits for all 32 leave nothing of the others."""
    frozen = random_artifact(decoder_specs(QuantSpec(4, 32)))
    others, weights = dict(frozen.others), dict(frozen.weights)
    for name in others:
        if "language_model.layers" in name and "layernorm" in name:
            others[name] = others[name].clone()
            others[name][::32] = 1000
    for name, weight in weights.items():
        if any(reader in name for reader in READ_THE_NORM):
            codes = weight.codes.clone()
            codes[:, ::32] = 0
            weights[name] = FrozenWeight.from_codes(codes, weight.scales, weight.spec)
    return replace(frozen, others=others, weights=weights)


def session_of(folder: Path) -> Any:
    return json.loads((folder / "session.json").read_text())


def test_outliers_keep_graphs_faithful(tmp_path: Path) -> None:
    frozen = with_outliers()
    *_, note = Onnx().write(frozen, tmp_path / "auto")
    session = session_of(tmp_path / "auto")
    figures = session["gates"]
    assert session["mode"] == "faithful"
    assert "KL" in figures["not_fast"] and "from the codes in float32" in figures["not_fast"]
    assert note == f"mode faithful: in fast mode {figures['not_fast']}"
    modes = figures["modes"]
    assert modes["faithful"]["logits"]["kl"] < 1e-9 < 1e-2 < modes["fast"]["logits"]["kl"]
    assert figures["logits"] == modes["faithful"]["logits"]
    Onnx(mode="faithful").write(frozen, tmp_path / "faithful")
    asked = session_of(tmp_path / "faithful")
    assert "modes" not in asked["gates"] and asked["sha256"] == session["sha256"]


def test_the_mode_of_written_graphs(bundle: Path, compiled: CompiledModel, tmp_path: Path) -> None:
    """Graphs whose mode is changed have the bytes of those that are written so."""
    fast = Path(shutil.copytree(bundle / "onnx", tmp_path / "fast"))
    config = SessionConfig.read(fast)
    assert config.mode == "fast"
    written = (fast / GRAPH).read_bytes()
    faithful = set_mode(fast, config, "faithful")
    assert faithful.mode == "faithful" and faithful.sha256[GRAPH] != config.sha256[GRAPH]
    Onnx(mode="faithful").write(artifact_of(compiled), tmp_path / "faithful")
    assert (tmp_path / "faithful" / GRAPH).read_bytes() == (fast / GRAPH).read_bytes() != written
    assert set_mode(fast, faithful, "fast").sha256 == config.sha256
    assert (fast / GRAPH).read_bytes() == written


def test_with_standard_operators_the_mode_is_an_option(exported: Path) -> None:
    config = SessionConfig.read(exported / "onnx")
    fast = set_mode(exported / "onnx", config, "fast")
    assert fast.sha256 == config.sha256
    assert (config.options, fast.options) == (
        {"session.qdq_matmulnbits_accuracy_level": "1"},
        {"session.qdq_matmulnbits_accuracy_level": "4"},
    )


def test_whoever_asks_more_decides(compiled: CompiledModel, tmp_path: Path) -> None:
    asked: list[Any] = []

    def accept(model: Any) -> str:
        asked.append((model.session_config.mode, model.generation_config))
        return "accuracy is lower by 9.0 ±1.0 points"

    *_, note = Onnx().examined(accept).write(artifact_of(compiled), tmp_path)
    assert note == "mode faithful: in fast mode accuracy is lower by 9.0 ±1.0 points"
    assert asked == [("fast", compiled.frozen.generation_config)]
    session = session_of(tmp_path)
    assert session["mode"] == "faithful" and session["gates"]["logits"]["kl"] < 1e-9


@pytest.fixture(scope="module")
def frozen_serving(compiled: CompiledModel, serving: Mapping[str, ServingProgram]) -> Serving:
    """The serving graphs of the original, with the codes of `compiled`."""
    return apply_codes(serving, compiled.weights)[0]


@pytest.fixture(scope="module")
def expected(compiled: CompiledModel, frozen_serving: Serving) -> Expected:
    model = build(compiled.frozen, torch.float32)
    return Expected(frozen_serving, model, replace(compiled.frozen, reference=None))


class Upside(ServingRuntime):
    """Its likeliest token is the least likely one: always, or from the second token on."""

    first = True

    def _prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model: Any = SimpleNamespace(config=self.config, dtype=torch.float32)
        return self.family.prepare(model, batch)

    def __call__(self, **batch: Tensor) -> Any:
        return CausalLMOutput(logits=prompt_logits(self, self._prepare(batch)))

    def generate(self, max_new_tokens: int, **batch: Tensor) -> Tensor:
        steps = greedy(self, self._prepare(batch), max_new_tokens=max_new_tokens)
        return torch.cat([batch["input_ids"], *(step.tokens[:, None] for step in steps)], dim=1)

    def decode(self, *inputs: Any) -> tuple[Tensor, Any]:
        *_, past = inputs
        logits, longer = super().decode(*inputs)
        return (logits if past is None and not self.first else -logits), longer


class Forgetful(Upside):
    first = False


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("faithful", Upside, "the lowered model's logits are off by KL"),
        ("faithful", Forgetful, "2 greedy answers differ from those of the codes"),
        ("fast", Upside, "off by KL .*, the bound for 8-bit activations is 0.1; use mode faithful"),
    ],
)
def test_graphs_that_answer_otherwise_than_the_codes_are_an_error(
    compiled: CompiledModel,
    frozen_serving: Serving,
    expected: Expected,
    mode: str,
    kind: type[Upside],
    message: str,
) -> None:
    trial = expected.measure(kind(frozen_serving, compiled.frozen.config))
    with pytest.raises(GateError, match=message):
        expected.hold(trial, mode)


def test_an_answer_that_differs_is_allowed_in_fast_mode_where_it_is_asked_for(
    compiled: CompiledModel, frozen_serving: Serving, expected: Expected
) -> None:
    trial = expected.measure(Forgetful(frozen_serving, compiled.frozen.config))
    assert trial.greedy.different == 2 and trial.logits.kl == 0
    expected.hold(trial, "fast")
    assert expected.cost(trial) == "2 of 2 greedy answers differ from those of the codes"


def test_graphs_of_another_model_than_was_compiled_are_an_error(
    compiled: CompiledModel, exported: Path, frozen_serving: Serving
) -> None:
    """All that the graphs were built from may share a fault; the logits of the compilation not."""
    frozen, found = compiled.frozen, gracec.load(exported, "onnxruntime")
    assert frozen.reference is not None
    model = build(frozen, torch.float32)
    expected = Expected(frozen_serving, model, frozen)
    trial = expected.measure(found)
    expected.hold(trial, "faithful")
    assert isinstance(trial.compiled, LogitAgreement)
    assert trial.compiled.kl < 1e-3 and trial.compiled.top1 == 1
    assert expected.cost(trial) == ""
    tail = frozen.reference.logits
    expected.reference = replace(frozen.reference, logits=tail.flip(-1))
    expected.dense_compiled = trial.compiled
    trial = expected.measure(found)
    for mode in ("faithful", "fast"):
        with pytest.raises(GateError, match="off by KL"):
            expected.hold(trial, mode)
    assert "KL" in expected.cost(trial)
