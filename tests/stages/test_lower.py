"""lower runs every gate of the target and its own, and keeps what they found and what was said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

from gracec.capture import family_of
from gracec.compiled import CompiledModel
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen, Reference
from gracec.ir.program import Program
from gracec.journal import Agreement, Equal, Figure, Journal, Kernels, Note
from gracec.stages import lower as stage
from gracec.stages.lower import lower
from gracec.targets.base import Runtime, Target
from gracec.targets.torchao import Torchao, TorchaoModel

FROZEN = "analyze-modality,plan-quantization,insert-fake-quant,freeze"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Given(Target):
    """Hands out a runtime that is there already."""

    runtime: Any
    notes: tuple[Note, ...] = ()
    figures: tuple[tuple[str, Figure], ...] = ()

    def dense(self, frozen: Frozen) -> dict[str, str]:
        return {}

    def lower(self, frozen: Frozen, *, strict: bool = False) -> tuple[Runtime, Sequence[Note]]:
        if strict:
            raise GracecError("it would run dense")
        return self.runtime, self.notes

    def gates(self, runtime: Runtime, frozen: Frozen) -> Mapping[str, Figure]:
        return dict(self.figures)


@dataclass(frozen=True)
class Upside:
    """A runtime whose likeliest token is the least likely one."""

    runtime: TorchaoModel

    @property
    def dtype(self) -> torch.dtype:
        return self.runtime.dtype

    def __call__(self, **inputs: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=-self.runtime(**inputs).logits)


@pytest.fixture(scope="module")
def frozen(
    compiled: CompiledModel, llava: LlavaForConditionalGeneration, after: Callable[[str], Program]
) -> Frozen:
    """`compiled` as freezing hands it over, with the logits that lowering is held to."""
    family = family_of(llava)
    batch = family.example_batch(llava)
    with torch.no_grad():
        (logits,) = after(FROZEN)(**family.prepare(llava, batch))
    return replace(compiled.frozen, reference=Reference(batch, logits))


def test_what_the_target_found_and_said_is_in_the_journal(
    compiled: CompiledModel, frozen: Frozen
) -> None:
    note, kernels = Note("mine", "it is slow"), Kernels(14, 14)
    target, journal = Given(compiled.runtime, (note,), (("kernels", kernels),)), Journal()
    assert lower(frozen, target, journal) is compiled.runtime
    assert journal.notes == [note]
    assert journal.figures.keys() == {"kernels", "logits", "logits_dense"}
    assert journal.figures["kernels"] == kernels
    agreement = journal.figures["logits"]
    assert isinstance(agreement, Agreement) and agreement.bound is not None
    assert 0 < agreement.kl < agreement.bound < 2e-2


def test_logits_that_are_not_those_of_the_codes_are_an_error(
    compiled: CompiledModel, frozen: Frozen
) -> None:
    assert isinstance(compiled.runtime, TorchaoModel)
    target, journal = Given(Upside(compiled.runtime)), Journal()
    with pytest.raises(GateError, match="the lowered model's logits are off by KL"):
        lower(frozen, target, journal)
    lower(replace(compiled.frozen, reference=None), target, journal)  # as it was read
    assert not journal.figures


def test_int4_kernels_in_what_is_meant_as_dense_are_an_error(
    compiled: CompiledModel, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "dense_twin", lambda frozen, dtype: compiled.model)
    with pytest.raises(GateError, match="14 INT4 kernels ran among weights that are meant as"):
        lower(frozen, Given(compiled.runtime), Journal())


def test_strict_is_handed_to_the_target(compiled: CompiledModel) -> None:
    with pytest.raises(GracecError, match="it would run dense"):
        lower(compiled.frozen, Given(compiled.runtime), Journal(), strict=True)


def test_every_gate_of_torchao_has_its_figure(compiled: CompiledModel) -> None:
    figures = Torchao().gates(compiled.runtime, compiled.frozen)
    assert figures["int4_kernels"] == Kernels(14, 14)
    assert figures["lowered_equals_generating"] == Equal(3, "batches")
    assert figures["matmul_error"].value > 0  # type: ignore[attr-defined]


def test_a_packed_weight_of_other_codes_is_an_error(compiled: CompiledModel) -> None:
    other = Q_PROJ.replace("layers.0", "layers.1")
    weights = {**compiled.weights, Q_PROJ: compiled.weights[other]}
    with pytest.raises(GateError, match=f"{Q_PROJ}: INT4 matmul is off by"):
        Torchao().gates(compiled.runtime, replace(compiled.frozen, weights=weights))


def dense(compiled: CompiledModel) -> nn.Parameter:
    return nn.Parameter(compiled.weights[Q_PROJ].dequantize(torch.bfloat16))


def test_a_dense_weight_in_the_lowered_graph_is_an_error(compiled: CompiledModel) -> None:
    program = compiled.program.copy()
    program.set_tensor(f"model.{Q_PROJ}", dense(compiled))
    with pytest.raises(GateError, match="13 INT4 kernels ran in the lowered graph, 14 are planned"):
        Torchao().gates(TorchaoModel(compiled.model, program), compiled.frozen)


def test_a_dense_weight_in_the_generating_model_is_an_error(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = compiled.model.get_submodule(Q_PROJ.removesuffix(".weight"))
    monkeypatch.setitem(linear._parameters, "weight", dense(compiled))
    with pytest.raises(GateError, match="13 weights ran on INT4 kernels in the generating"):
        Torchao().gates(compiled.runtime, compiled.frozen)


def test_a_model_that_generates_otherwise_than_the_graph_is_an_error(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = compiled.model.get_submodule("model.language_model.norm")
    assert isinstance(norm.weight, nn.Parameter)
    monkeypatch.setitem(norm._parameters, "weight", nn.Parameter(norm.weight.detach() * 2))
    with pytest.raises(GateError, match="captured graph and eager model differ by"):
        Torchao().gates(compiled.runtime, compiled.frozen)
