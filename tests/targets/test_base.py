"""Targets are known by name; what they cannot run is said before anything is lowered."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.compiled import CompiledModel
from gracec.errors import GracecError
from gracec.frozen import Frozen, dense_twin
from gracec.journal import Note
from gracec.quant import QuantSpec
from gracec.request import Request
from gracec.targets import TARGETS, Runtime, Target, target_named
from gracec.targets.torchao import Torchao
from tests.backends.artifacts import decoder_specs, random_artifact
from tests.signed import signed_recipe


class Odd(Target):
    """Takes no weight of layer 0, and refuses models of three bits."""

    name: ClassVar[str] = "odd"

    def refusal(self, frozen: Frozen) -> str:
        return "three bits" if any(w.spec.bits == 3 for w in frozen.weights.values()) else ""

    def dense(self, frozen: Frozen) -> dict[str, str]:
        return {fqn: "it is in layer 0" for fqn in frozen.weights if "layers.0" in fqn}

    def lower(self, frozen: Frozen, *, strict: bool = False) -> tuple[Runtime, Sequence[Note]]:
        raise AssertionError("it was lowered")


@pytest.fixture(scope="module")
def artifact() -> Frozen:
    return random_artifact(decoder_specs(QuantSpec(4, 32)))


def test_targets_are_known_by_name_and_by_other_words() -> None:
    assert {"odd", "onnxruntime", "torchao"} <= set(TARGETS.all())
    assert isinstance(target_named(None), Torchao)
    assert target_named("onnx").name == "onnxruntime"
    with pytest.raises(GracecError, match="unknown target 'torchoa'; did you mean 'torchao'"):
        target_named("torchoa")


def test_two_targets_with_one_word_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "aliases", ("onnx",))
    with pytest.raises(GracecError, match="'onnx' is another word for target .* and for 'odd'"):
        target_named("torchao")


def test_what_runs_dense_is_counted_and_refused_in_strict_mode(artifact: Frozen) -> None:
    assert Odd().summary(artifact).startswith("7 of 14 weights would run dense, first model.")
    Odd().check(artifact)
    with pytest.raises(GracecError, match=r"layers\.0.*no kernel of odd takes it: it is in layer"):
        Odd().check(artifact, strict=True)
    half = {fqn: weight for fqn, weight in artifact.weights.items() if "layers.0" in fqn}
    with pytest.raises(GracecError, match="no kernel takes any of the weights: 7: it is in layer"):
        Odd().summary(replace(artifact, weights=half))
    assert Torchao().summary(artifact) == "kernels for all 14 weights"


def test_a_target_that_refuses_the_plan_is_asked_before_anything_is_frozen(
    llava: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was frozen")

    monkeypatch.setattr("gracec.compiler.freeze", never)
    recipe = {"name": "narrow", "weights": {"decoder": {"bits": 3, "group_size": 32}}}
    with pytest.raises(GracecError, match="target odd: three bits; choose another target"):
        gracec.compile(llava, gracec.Recipe.from_dict(recipe), target="odd")


def test_a_target_without_negative_scales_gets_positive_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Odd, "holds_signed", False)
    signed = signed_recipe()
    request = Request.checked(None, signed, target="odd")
    assert request.notes == (Note("", "target odd takes no negative scales: unsigned"),)
    rule = request.recipe.weights["decoder"]
    assert rule is not None and rule.spec() == QuantSpec(4, 32)
    with pytest.raises(
        GracecError, match="recipe signed: target odd takes no negative scales; compile with `sig"
    ):
        Request.checked(None, signed, target="odd", strict=True)
    kept = Request.checked(None, signed, target="torchao", strict=True)
    assert kept.recipe == signed and kept.notes == ()


def test_a_target_refuses_signed_scales_that_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signed = random_artifact(decoder_specs(QuantSpec(4, 32, signed=True)))
    for kind in TARGETS.all().values():
        if kind.__module__.startswith("gracec."):
            assert kind.holds_signed
            kind().check(signed, strict=True)
    monkeypatch.setattr(Torchao, "holds_signed", False)
    with pytest.raises(GracecError, match="target torchao: .* has signed scales, and it takes no"):
        Torchao().check(signed)


def test_stand_ins_get_the_answers_of_the_codes(compiled: CompiledModel) -> None:
    """What is refused before training is what is refused after it."""
    from gracec.quant.frozen import FrozenWeight

    planned = {
        fqn: FrozenWeight.planned((weight.shape[0], weight.shape[1]), weight.spec)
        for fqn, weight in compiled.weights.items()
    }
    for fqn, weight in planned.items():
        real = compiled.weights[fqn]
        assert (weight.shape, weight.group_size) == (real.shape, real.group_size)
        assert weight.scales.shape == real.scales.shape and weight.stored.dtype == real.stored.dtype
        assert weight.stored.untyped_storage().nbytes() == 1
    stand_ins = replace(compiled.frozen, weights=planned)
    for kind in TARGETS.all().values():
        if kind.__module__.startswith("gracec."):
            assert kind().refusal(stand_ins) == kind().refusal(compiled.frozen)
            assert kind().dense(stand_ins) == kind().dense(compiled.frozen)


def test_the_dense_twin_computes_codes_times_scales(artifact: Frozen) -> None:
    twin = dense_twin(artifact, torch.float32)
    fqn, weight = next(iter(artifact.weights.items()))
    owner = twin.get_submodule(fqn.rpartition(".")[0])
    x = torch.randn(3, weight.shape[1])
    assert torch.equal(owner(x), torch.nn.functional.linear(x, weight.dequantize()))
    assert twin.get_parameter(fqn).untyped_storage().nbytes() == 4  # only while it runs
