import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.capture import capture
from gracec.compiled import CompiledModel
from gracec.ir.program import Program
from gracec.models.surgery import own_weights
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.free_scales import FreeScales
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant import QuantSpec, codes, signal_to_noise_db
from gracec.recipe import Recipe
from gracec.report.report import (
    ERRORS,
    SQNR_NOTE,
    Report,
    error_head,
    error_rows,
    sqnr_db,
    weight_bytes,
)
from gracec.training.candidate import write_codes
from tests.backends.artifacts import random_artifact
from tests.tiny import tiny_llava


def test_the_error_of_every_quantized_weight_is_in_the_report(
    compiled: CompiledModel, llava: LlavaForConditionalGeneration
) -> None:
    rows = {row.fqns[0]: row for row in compiled.report.plan}
    for fqn, weight in compiled.weights.items():
        exact = signal_to_noise_db(llava.get_parameter(fqn).detach(), weight.dequantize())
        assert rows[fqn].sqnr_db == pytest.approx(exact, abs=1e-3)
        assert 15 < exact < 30  # 4 bits
    kept = [row for row in compiled.report.plan if row.spec is None]
    assert kept and not any("sqnr_db" in row.to_dict() for row in kept)
    assert json.loads(json.dumps(compiled.report.to_dict(), allow_nan=False))


def test_the_worst_weight_comes_first(compiled: CompiledModel) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(compiled.report.errors_table())
    lines = console.export_text().splitlines()
    found = [float(line.split()[-2]) for line in lines if "model." in line]
    assert len(found) == len(compiled.weights)
    assert found == sorted(found)


def printed(report: Report) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.errors_table())
    return console.export_text()


def test_output_errors_rank_before_the_noise_of_weights(corrected: Report) -> None:
    rows = error_rows(corrected.plan)
    assert error_head(corrected.plan)[3:] == ("plain error", "searched", "compiled")
    names = [row.fqns[0] for row in corrected.plan if row.spec is not None]
    by_error = sorted(range(14), key=lambda place: (place + 1) * (0.9 if place == 13 else 0.3))
    assert [row[0] for row in rows] == [names[place] for place in by_error[:0:-1]] + names[:1]
    assert rows[0][3:] == ("0.014", "0.0112", "0.0126")
    assert rows[-3][3:] == ("0.003", "0.0024", "0.0009, partly rounded")
    assert rows[-2][3:] == ("0.002", "0.0016", "0.0006, rounded")
    assert rows[-1][3:] == ("-", "-", "-") and float(rows[-1][2]) > 10


def test_the_table_says_that_noise_of_weights_is_not_minimised(
    corrected: Report, compiled: CompiledModel
) -> None:
    text = printed(corrected)
    assert SQNR_NOTE in " ".join(text.split())
    lines = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    for row in corrected.plan:  # in full, over as many lines as it takes
        assert row.spec is None or row.fqns[0] in "".join(lines)
    assert error_head(compiled.report.plan) == ERRORS
    assert "SQNR does not say" not in " ".join(printed(compiled.report).split())


def test_a_line_says_what_correcting_was_worth(corrected: Report, compiled: CompiledModel) -> None:
    assert corrected.output_error_line() == (
        "output error on held-out inputs: median 0.3 of plain rounding's, worst 0.9; "
        "logits KL 0.0079 nats against 0.049"
    )
    assert replace(corrected, gates={}).output_error_line() == (
        "output error on the inputs it was calibrated on: median 0.3 of plain rounding's, worst 0.9"
    )
    assert compiled.report.output_error_line() == ""


@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
def test_chunks_add_up_at_every_granularity(
    granularity: str, captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"bits": 4, "group_size": 32, "granularity": granularity}
    recipe = Recipe.model_validate({"name": "test", "weights": {"decoder": rule}})
    passes = [AnalyzeModality(), PlanQuantization(recipe=recipe), InsertFakeQuant(candidates=4)]
    program = run_passes(captured, passes).program
    weights = frozen_weights(run_passes(program, [Freeze()]).program)
    monkeypatch.setattr(codes, "CHUNK_ELEMENTS", 1000)
    found = sqnr_db(program)
    assert found.keys() == weights.keys() and len(found) == 14
    for fqn, weight in weights.items():
        exact = signal_to_noise_db(captured.tensor(f"model.{fqn}").detach(), weight.dequantize())
        assert found[fqn] == pytest.approx(exact, abs=1e-3)


def test_codes_are_compared_with_the_original(llava: LlavaForConditionalGeneration) -> None:
    """Frozen ones, those whose scales learn, and float weights that were made of codes."""
    text = "analyze-modality,plan-quantization,insert-fake-quant"
    fake = run_passes(capture(own_weights(llava)), parse_pipeline(text)).program
    frozen, freed = (item().run(fake).program for item in (Freeze, FreeScales))
    expected = sqnr_db(fake)
    assert sqnr_db(fake, llava) == expected
    assert not sqnr_db(frozen) and not sqnr_db(freed)
    weights = frozen_weights(frozen)
    found = [sqnr_db(program, llava) for program in (frozen, freed)]
    write_codes(fake, weights)
    assert set(sqnr_db(fake).values()) == {math.inf}
    for figures in (*found, sqnr_db(fake, llava)):
        assert figures == pytest.approx(expected, abs=1e-6)


def test_a_weight_without_noise_has_no_figure() -> None:
    model, fqn = tiny_llava(), "model.language_model.layers.0.mlp.up_proj.weight"
    torch.nn.init.zeros_(model.get_parameter(fqn))
    text = "analyze-modality,plan-quantization,insert-fake-quant"
    found = sqnr_db(run_passes(capture(model), parse_pipeline(text)).program)
    assert [name for name, figure in found.items() if figure == math.inf] == [fqn]


def test_the_figures_are_saved(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path / "out")
    assert gracec.load(tmp_path / "out").report.plan == compiled.report.plan


@pytest.mark.parametrize(
    ("spec", "codes_of_64_by_64", "scales"),
    [
        (QuantSpec(4, 32), 2048, 64 * 2),
        (QuantSpec(8, 64), 4096, 64),
        (QuantSpec(2, granularity="per_channel"), 2048, 64),  # two codes a byte, whatever they use
    ],
    ids=str,
)
def test_codes_and_scales_are_counted(spec: QuantSpec, codes_of_64_by_64: int, scales: int) -> None:
    fqn = "model.language_model.layers.0.self_attn.q_proj.weight"
    frozen = random_artifact({fqn: spec})
    parameters = sum(parameter.numel() for parameter in frozen.skeleton.parameters())
    sizes = weight_bytes(frozen, parameters)
    assert sizes["bfloat16"] == 2 * parameters
    assert sizes["compiled"] == 2 * (parameters - 64 * 64) + codes_of_64_by_64 + 2 * scales
