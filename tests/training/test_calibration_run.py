"""A calibration that is interrupted goes on from the sets that are done, to the same bits."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.errors import GracecError
from gracec.passes.correct_codes import Corrected
from gracec.quant import Experts, FrozenWeight, QuantSpec
from gracec.quant.frozen import code_hash
from gracec.training.calibration_run import CalibrationRun, calibrated_sets, calibration_run
from gracec.training.checkpoints.fingerprint import Fingerprint
from tests.tiny import WORDS, tiny_processor

RECIPE = {"name": "test", "weights": {"decoder": {"bits": 3, "group_size": 32, "signed": True}}}
SETS = 8
"""Fused sets of the decoder: two blocks of q/k/v, o, gate/up and down."""


def texts(seed: int = 0) -> list[dict[str, str]]:
    chosen = random.Random(seed)
    return [{"text": " ".join(chosen.choices(WORDS, k=300))} for _ in range(4)]


def options(**fields: Any) -> dict[str, Any]:
    recipe = gracec.Recipe.from_dict({**RECIPE, **fields.pop("recipe", {})})
    whole = {"processor": tiny_processor(), "train_data": texts(), "formats": ()}
    return {"recipe": recipe, "progress": False, **whole, **fields}


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a compilation stop once so many sets are kept."""
    keep, count = CalibrationRun.keep, 0

    def counted(run: CalibrationRun, *arguments: Any) -> None:
        nonlocal count
        keep(run, *arguments)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(CalibrationRun, "keep", counted)


def hashes(compiled: gracec.CompiledModel) -> dict[str, str]:
    return {fqn: code_hash(weight) for fqn, weight in compiled.frozen.weights.items()}


def test_an_interrupted_calibration_resumes_to_the_same_codes(
    llava: LlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gracec.compile(llava, output_dir=tmp_path / "whole", **options())
    assert not (tmp_path / "whole.training").exists()
    with monkeypatch.context() as patch:
        interrupt(patch, SETS + 3)
        with pytest.raises(KeyboardInterrupt):
            gracec.compile(llava, output_dir=tmp_path / "out", **options())
    kept = [path.name for path in calibrated_sets(tmp_path / "out.training")]
    assert len(kept) == SETS + 3 and kept[0] == "0.25-00000.safetensors"
    with pytest.raises(GracecError, match="an earlier run was interrupted here; go on with"):
        gracec.compile(llava, output_dir=tmp_path / "out", **options())
    solved = 0
    solve = gracec.passes.correct_codes._Run._solve

    def counted(*arguments: Any) -> Any:
        nonlocal solved
        solved += 1
        return solve(*arguments)

    monkeypatch.setattr(gracec.passes.correct_codes._Run, "_solve", counted)
    again = gracec.compile(llava, output_dir=tmp_path / "out", resume=True, **options())
    assert solved == 3 * SETS - (SETS + 3)
    assert hashes(again) == hashes(whole)
    assert not (tmp_path / "out.training").exists()


@pytest.mark.slow
def test_a_calibration_of_something_else_is_not_gone_on_with(
    llava: LlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            gracec.compile(llava, output_dir=tmp_path / "out", **options())
    for what, changed in {
        "data": {"train_data": texts(1)},
        "recipe": {"recipe": {"calibration": {"damping": 0.02}}},
    }.items():
        given = options(**changed)
        with pytest.raises(GracecError, match=f"the {what} changed since the checkpoint"):
            gracec.compile(llava, output_dir=tmp_path / "out", resume=True, **given)
    (path,) = calibrated_sets(tmp_path / "out.training")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GracecError, match="is damaged .*; remove it"):
        gracec.compile(llava, output_dir=tmp_path / "out", resume=True, **options())


@pytest.mark.slow
def test_a_file_of_the_user_stays(
    llava: LlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            gracec.compile(llava, output_dir=tmp_path / "out", **options())
    mine = tmp_path / "out.training" / "calibrated" / "notes.txt"
    mine.write_text("mine")
    done = gracec.compile(llava, output_dir=tmp_path / "out", resume=True, **options())
    assert mine.read_text() == "mine"
    assert any("calibrated/notes.txt" in note.text for note in done.report.notes)


def test_a_set_comes_back_as_it_was(tmp_path: Path) -> None:
    fingerprint = Fingerprint(*"abcde", device="here")
    spec = QuantSpec(bits=3, group_size=32, signed=True)
    scales = torch.full((4, 2), -0.5)
    codes = torch.randint(-4, 4, (4, 64), dtype=torch.int8)
    weight = FrozenWeight.from_codes(codes, scales, spec, Experts(2, transposed=True))
    with calibration_run(False, tmp_path, fingerprint) as run:
        assert run.kept("0", 0) is None
        run.keep("0", 0, 1, {"w": Corrected(weight, (0.5, 0.25, 0.125), "corrected")})
        found = run.kept("0", 0)
    assert found is not None
    assert code_hash(found["w"].weight) == code_hash(weight)
    assert found["w"].errors == (0.5, 0.25, 0.125) and found["w"].how == "corrected"


def test_codes_out_of_range_are_refused(tmp_path: Path) -> None:
    fingerprint = Fingerprint(*"abcde", device="here")
    spec = QuantSpec(bits=3, group_size=32)
    weight = FrozenWeight.from_codes(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2), spec)
    with calibration_run(False, tmp_path, fingerprint) as run:
        run.keep("0", 0, 1, {"w": Corrected(weight, (0.5, 0.25, 0.125), "corrected")})
        (path,) = calibrated_sets(tmp_path)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        wide = {
            "w.codes": torch.full((4, 32), 0x77, dtype=torch.uint8),
            "w.scales": torch.ones(4, 2),
        }
        save_file(wide, path, metadata=metadata)
        with pytest.raises(GracecError, match="out of 3 bits"):
            run.kept("0", 0)
        save_file({"w.codes": wide["w.codes"]}, path, metadata=metadata)
        with pytest.raises(GracecError, match="has no codes of w; remove it"):
            run.kept("0", 0)


def test_progress_is_told_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights: dict[str, Corrected] = {}
    with calibration_run(True) as run:
        for number in range(3):
            run.keep("0.25", number, 3, weights)
    with warnings.catch_warnings():
        said = capsys.readouterr().err.splitlines()
    assert said == ["calibrating 1/3 (asymmetric 0.25)", "calibrating 3/3 (asymmetric 0.25)"]
