import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.compiler import CompiledModel
from gracec.passes.freeze import FrozenWeight
from gracec.quant import QuantSpec, quantize, search_scales, signal_to_noise_db
from gracec.report import report as report_module
from gracec.report.report import sqnr_db
from tests.tiny import tiny_llava


def test_the_error_of_every_quantized_weight_is_in_the_report(
    compiled: CompiledModel, llava: LlavaForConditionalGeneration
) -> None:
    rows = {row["fqns"][0]: row for row in compiled.report.plan}
    for fqn, weight in compiled.weights.items():
        exact = signal_to_noise_db(llava.get_parameter(fqn).detach(), weight.dequantize())
        assert rows[fqn]["sqnr_db"] == pytest.approx(exact, abs=1e-3)
        assert 15 < exact < 30  # 4 bits
    kept = [row for row in compiled.report.plan if not row["spec"]]
    assert kept and not any("sqnr_db" in row for row in kept)
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
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fqn = tiny_llava(), "model.language_model.layers.0.mlp.up_proj.weight"
    original = model.get_parameter(fqn).detach()
    spec = QuantSpec(group_size=32, granularity=granularity)
    rows, columns = spec.scale_shape(*original.shape)
    scales = search_scales(original, 4, 32, candidates=4)[:rows, :columns]
    scales = scales.expand(rows, columns).contiguous()
    codes = quantize(original, scales.expand(original.shape[0], -1), 4, spec.group_of(64))
    weight = FrozenWeight(codes, scales, spec)
    exact = signal_to_noise_db(original, weight.dequantize())
    monkeypatch.setattr(report_module, "CHUNK_ELEMENTS", 1000)
    assert sqnr_db(model, {fqn: weight})[fqn] == pytest.approx(exact, abs=1e-3)


def test_a_weight_without_noise_has_no_figure() -> None:
    model, fqn = tiny_llava(), "model.language_model.layers.0.mlp.up_proj.weight"
    codes = torch.ones(128, 64, dtype=torch.int8)
    weight = FrozenWeight(codes, torch.full((128, 2), 0.5), QuantSpec(group_size=32))
    with torch.no_grad():
        model.get_parameter(fqn).fill_(0.5)
    assert sqnr_db(model, {fqn: weight}) == {fqn: None}


def test_the_figures_are_saved(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path / "out")
    assert gracec.load(tmp_path / "out").report.plan == compiled.report.plan
