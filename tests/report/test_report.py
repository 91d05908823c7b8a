import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.capture import capture
from gracec.compiled import CompiledModel
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant import QuantSpec, codes, signal_to_noise_db
from gracec.recipe import Recipe
from gracec.report.report import sqnr_db, weight_bytes
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
