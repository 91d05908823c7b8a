"""A compilation that trains scales alone: the codes are those of before, and the logits nearer."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.compiled import CompiledModel
from gracec.errors import GracecError
from gracec.stages import train as stage
from tests.children import in_a_child
from tests.tiny import WORDS, tiny_image, tiny_llava, tiny_processor

TEXTS = [
    {"text": " ".join(WORDS[(7 * number + step * step) % len(WORDS)] for step in range(160))}
    for number in range(8)
]
ASKED = [
    {"image": tiny_image(number), "question": f"what is {WORDS[number]} ?"} for number in range(8)
]
BUILT_IN = gracec.Recipe.load("w4a16-scales")


def recipe(training: dict[str, Any] | None = None, **decoder: Any) -> gracec.Recipe:
    """The built-in one, for a model that is tiny and codes that are few."""
    fields = BUILT_IN.to_dict()
    fields["weights"] = {"decoder": {"bits": 2, "group_size": 32, **decoder}}
    small = {"steps": 10, "scale_lr": 5e-3, "max_length": 32, "evaluate_every": 5}
    fields["training"] |= {**small, "checkpoint_every": 2, "precision": "float32"}
    fields["training"] |= training or {}
    return gracec.Recipe.from_dict(fields)


def calibrated(rule: gracec.Recipe, method: str) -> gracec.Recipe:
    return gracec.Recipe.from_dict({**rule.to_dict(), "calibration": {"method": method}})


def compiled(model: Any, rule: gracec.Recipe, data: Any = TEXTS, **options: Any) -> CompiledModel:
    more = {"processor": tiny_processor(), "progress": False, "formats": (), **options}
    return gracec.compile(model, rule, train_data=data, **more)


def untrained(model: Any, rule: gracec.Recipe, data: Any = TEXTS) -> CompiledModel:
    """The same with no step taken that counts."""
    still = {**rule.to_dict()["training"], "scale_lr": 0.0, "steps": 1}
    return compiled(model, gracec.Recipe.from_dict({**rule.to_dict(), "training": still}), data)


@pytest.mark.parametrize(("method", "signed"), [("weights", False), ("gptq", True)])
def test_codes_stay_scales_learn_and_the_logits_come_nearer(
    method: str, signed: bool, block: LlavaForConditionalGeneration
) -> None:
    rule = calibrated(recipe(signed=signed), method)
    found, before = compiled(block, rule), untrained(block, rule)
    training = found.report.training
    assert training["chosen_by"] == "held_out_kl" and training["best_step"] > 0
    first, *_, last = (row["held_out_kl"] for row in training["held_out"])
    assert last < 0.99 * first
    assert first == before.report.training["held_out"][0]["held_out_kl"]
    assert found.weights.keys() == before.weights.keys() and len(found.weights) == 7
    for fqn, weight in found.weights.items():
        other = before.weights[fqn]
        assert torch.equal(weight.stored, other.stored), fqn
        assert not torch.equal(weight.scales, other.scales), fqn
        assert torch.equal(weight.scales.sign(), other.scales.sign()), fqn
    negative = any(bool((weight.scales < 0).any()) for weight in found.weights.values())
    assert negative == signed
    noise = {row.fqns[0]: row for row in found.report.plan if row.spec is not None}
    assert noise.keys() == found.weights.keys()
    assert all(0 < (row.sqnr_db or 0) < 60 > (row.ptq_sqnr_db or 99) for row in noise.values())
    fresh = tiny_llava(tie=True, num_hidden_layers=1).state_dict()
    assert all(torch.equal(fresh[name], t) for name, t in block.state_dict().items())
    said = [str(note) for note in found.report.notes]
    assert any("held-out KL to the teacher" in line for line in said)


def test_questions_without_answers_teach_too(block: LlavaForConditionalGeneration) -> None:
    rule = calibrated(recipe({"steps": 2, "max_length": None}), "weights")
    found = compiled(block, rule, ASKED)
    assert [row["step"] for row in found.report.training["held_out"]] == [0, 2]


def options() -> dict[str, Any]:
    return {"processor": tiny_processor(), "progress": False, "formats": (), "train_data": TEXTS}


def compile_until_killed(directory: Path) -> None:
    learn = stage.train_learner

    def killed(*arguments: Any, **more: Any) -> Any:
        def die(row: dict[str, Any]) -> None:
            if row["step"] == 3 and "ce" in row:
                os.kill(os.getpid(), signal.SIGKILL)

        return learn(*arguments, **{**more, "log": die})

    stage.train_learner = killed  # type: ignore[assignment]
    gracec.compile(
        tiny_llava(tie=True, num_hidden_layers=1), recipe(), output_dir=directory, **options()
    )


@pytest.mark.slow
def test_a_killed_compilation_resumes_to_the_same_scales(
    block: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    whole = gracec.compile(block, recipe(), output_dir=tmp_path / "whole", **options())
    assert in_a_child(compile_until_killed, tmp_path / "out") == signal.SIGKILL
    more = {**options(), "output_dir": tmp_path / "out", "resume": True}
    other = calibrated(recipe(), "weights")
    with pytest.raises(GracecError, match="the recipe changed since the checkpoint was written"):
        gracec.compile(block, other, **more)
    again = gracec.compile(block, recipe(), **more)
    assert any("resumed after optimizer step 2" in note.text for note in again.report.notes)
    assert again.report.training == whole.report.training
    for fqn, weight in whole.weights.items():
        assert torch.equal(weight.stored, again.weights[fqn].stored)
        assert torch.equal(weight.scales, again.weights[fqn].scales)


def test_there_must_be_scales_that_learn(block: LlavaForConditionalGeneration) -> None:
    with pytest.raises(GracecError, match="learns: scales needs weights that are quantized"):
        gracec.Recipe.from_dict({**BUILT_IN.to_dict(), "weights": {}})
    with pytest.raises(GracecError, match="nothing learns: every part"):
        compiled(block, recipe({"frozen": ["decoder"]}))
