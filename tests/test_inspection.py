import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlavaForConditionalGeneration

from gracec.compiled import CompiledModel
from gracec.errors import GracecError
from gracec.inspection import inspect_artifact, inspect_model
from gracec.report.partition import Inspection
from gracec.store import TENSORS
from tests.test_store import reseal
from tests.tiny import tiny_llava


@pytest.fixture(scope="module")
def directory(
    llava: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Only a configuration: no weight is needed, so none is there."""
    path = tmp_path_factory.mktemp("inspection")
    llava.config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(directory: Path) -> Inspection:
    return inspect_model(directory)


def test_every_parameter_is_in_exactly_one_part(
    found: Inspection, llava: LlavaForConditionalGeneration
) -> None:
    parts = {part.part: part for part in found.parts}
    assert list(parts) == ["vision", "projector", "decoder", "head", "unused"]
    assert sum(part.parameters for part in parts.values()) == llava.num_parameters()
    assert sum(part.tensors for part in parts.values()) == len(list(llava.parameters()))

    def count(prefix: str) -> int:
        return sum(p.numel() for n, p in llava.named_parameters() if n.startswith(prefix))

    tower = "model.vision_tower."
    # The features are taken before the last block, so nothing from there on is used.
    unused = count(f"{tower}encoder.layers.1.") + count(f"{tower}post_layernorm.")
    assert parts["unused"].parameters == unused
    assert parts["vision"].parameters == count(tower) - unused
    assert parts["projector"].parameters == count("model.multi_modal_projector.")
    language = "model.language_model."
    assert parts["head"].parameters == count(f"{language}embed_tokens.")
    assert parts["decoder"].parameters == count(language) - count(f"{language}embed_tokens.")
    assert found.tied == (("model.language_model.embed_tokens.weight", "lm_head.weight"),)


def test_an_embedding_of_its_own_is_a_part_of_its_own(tmp_path: Path) -> None:
    model = tiny_llava(tie=False)
    model.config.save_pretrained(tmp_path)
    parts = {part.part: part for part in inspect_model(tmp_path).parts}
    assert parts["embedding"].parameters == parts["head"].parameters == 128 * 64
    assert parts["embedding"].modality == "text"


def test_what_is_quantized_agrees_with_a_compilation(
    found: Inspection, compiled: CompiledModel
) -> None:
    report = compiled.report
    without_figures = tuple(replace(row, sqnr_db=None) for row in report.plan)
    assert found.plan == without_figures
    assert found.memory.weights["compiled"] == report.sizes["compiled"]
    assert found.memory.weights["bfloat16"] == report.sizes["bfloat16"]
    decoder = next(part for part in found.parts if part.part == "decoder")
    assert decoder.quantized_weights == decoder.weights == 14
    assert decoder.planned_bytes < decoder.bytes / 5
    assert any("group 128 does not divide 64, group 64 instead" in note for note in found.notes)


def test_the_tables_name_every_part(found: Inspection) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.partition_table())
    console.print(found.plan_table())
    text = console.export_text()
    for part in found.parts:
        assert text.count(part.part) >= 2
        assert f"{part.parameters:,}" in text


def test_an_artifact_shows_its_report(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path / "int4")
    (tmp_path / "int4" / TENSORS).unlink()  # the manifest is enough
    assert inspect_artifact(tmp_path / "int4").to_dict() == compiled.report.to_dict()
    reseal(tmp_path / "int4", report={})
    with pytest.raises(GracecError, match="the manifest holds no report"):
        inspect_artifact(tmp_path / "int4")
