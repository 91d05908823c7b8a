"""What is saved is what is in memory, and nothing that took long is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import gracec
from gracec import compiler
from gracec.backends.awq import Awq
from gracec.errors import GateError, GracecError
from gracec.journal import Journal, Note
from gracec.quant import QuantSpec
from gracec.recipe import Recipe
from gracec.report import Report
from gracec.stages.publish import read_artifact, write_artifact
from gracec.store import read_manifest
from tests.backends.artifacts import decoder_specs, random_artifact
from tests.stages.test_purity import RECORDS, TRAINED
from tests.tiny import tiny_processor

OPTIONS: dict[str, Any] = {"processor": tiny_processor(), "progress": False}


def test_the_report_in_memory_is_the_saved_one(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    weights = {"decoder": {"group_size": 32, "bits": 3}, "projector": {"group_size": 32, "bits": 3}}
    recipe = Recipe.from_dict({"name": "narrow", "weights": weights})
    compiled = gracec.compile(
        llava, recipe, output_dir=tmp_path / "out", formats="hf,torchao", **OPTIONS
    )
    saved = read_manifest(tmp_path / "out").report
    assert saved == compiled.report.to_dict()
    assert gracec.load(tmp_path / "out").report == compiled.report
    sources = [note.source for note in compiled.report.notes]
    assert sources.index("lower-torchao") < sources.index("hf") < sources.index("torchao")
    # The model card says the same.
    assert str(compiled.report.gates["logits"]) in (tmp_path / "out/README.md").read_text()


def test_a_report_of_before_figures_had_bounds_is_read() -> None:
    old = {
        "recipe": {"name": "w4a16-ptq"},
        "plan": [],
        "notes": ["freeze: 28 weights frozen to codes"],
        "gates": {"captured_equals_eager": 3, "matmul_error": 0.5, "logits": {"kl": 0.25}},
        "sizes": {},
        "accuracy": {},
        "training": {},
    }
    report = Report.from_dict(old)
    assert report.notes == (Note("", "freeze: 28 weights frozen to codes"),)
    assert [str(figure) for figure in report.gates.values()] == ["3", "0.5", "kl 0.25"]
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_format_that_cannot_hold_the_plan_is_refused_before_training(
    llava: LlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(compiler, "train", never)
    sizes = {"decoder": {"group_size": 32}, "projector": {"group_size": 64}}
    mixed = Recipe.from_dict({**TRAINED.to_dict(), "weights": sizes})
    with pytest.raises(GracecError, match=r"format awq: AWQ has one group size .* \[32, 64\]"):
        gracec.compile(
            llava, mixed, train_data=RECORDS, output_dir=tmp_path / "o", formats="awq", **OPTIONS
        )
    wide = {"decoder": {"group_size": 16}}
    odd = Recipe.from_dict({**TRAINED.to_dict(), "weights": wide})
    with pytest.raises(GracecError, match=r"no kernel of torchao takes it: .* groups of"):
        gracec.compile(llava, odd, train_data=RECORDS, strict=True, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_refusals_of_stand_ins_are_those_of_the_codes() -> None:
    """What is refused before training is what would be refused after it."""
    artifact = random_artifact(decoder_specs(QuantSpec(4, 16)))
    assert "AWQ has groups of" in Awq().refusal(artifact)


@pytest.fixture
def late_failure(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def fail(*_: Any, **__: Any) -> None:
        raise GateError("the disk is full")

    monkeypatch.setattr(compiler, "lower", fail)
    return monkeypatch


def test_a_late_failure_costs_no_training(
    llava: LlavaForConditionalGeneration, tmp_path: Path, late_failure: pytest.MonkeyPatch
) -> None:
    options = {"train_data": RECORDS, "output_dir": tmp_path / "out", "formats": (), **OPTIONS}
    with pytest.raises(GateError, match="the disk is full"):
        gracec.compile(llava, TRAINED, **options)
    kept = gracec.load(tmp_path / "out.training" / "frozen")
    assert kept.report.training["best_step"] > 0
    codes = {fqn: (weight.stored, weight.scales) for fqn, weight in kept.weights.items()}
    late_failure.undo()

    def step(*_: Any) -> None:
        raise AssertionError("it was trained again")

    late_failure.setattr("gracec.training.loop.Run._optimizer_step", step)
    compiled = gracec.compile(llava, TRAINED, resume=True, **options)
    for fqn, weight in compiled.weights.items():
        assert torch.equal(weight.stored, codes[fqn][0])
        assert torch.equal(weight.scales, codes[fqn][1])
    assert not (tmp_path / "out.training").exists()


def test_writing_asks_for_a_report_or_what_to_make_it_from(tmp_path: Path) -> None:
    artifact = random_artifact(decoder_specs(QuantSpec(4, 32)))
    recipe = Recipe.load("w4a16-ptq")
    report, notes = write_artifact(
        tmp_path / "a", artifact, (), recipe=recipe, journal=Journal([Note("a", "b")])
    )
    assert report.notes == (Note("a", "b"),) and notes == ()
    frozen, again = read_artifact(tmp_path / "a")
    assert again == report and frozen.name == "maker/model"
