"""write_artifact: formats are heard, and what is read again is exactly what was written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gracec
from gracec.backends.base import CardFacts, parse_formats
from gracec.backends.compressed_tensors import HuggingFace
from gracec.directories import files_in
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.inspection import inspect_artifact
from gracec.journal import Equal, Journal, Note
from gracec.quant import QuantSpec
from gracec.recipe import Recipe
from gracec.stages.publish import read_artifact, write_artifact
from gracec.store import TENSORS, read_manifest
from tests.backends.artifacts import DECODER, decoder_specs, random_artifact
from tests.test_store import reseal

Q = f"{DECODER}.0.self_attn.q_proj.weight"
TOLD = Note("hf", "it is an odd one")


@dataclass(frozen=True)
class Telling(HuggingFace):
    """Writes nothing but what a reader of the artifact needs."""

    reason: str = ""

    def refusal(self, frozen: Frozen) -> str:
        return self.reason

    def card(self, frozen: Frozen) -> CardFacts | None:
        return None

    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        frozen.config.save_pretrained(directory)
        frozen.processor.save_pretrained(directory)
        return (TOLD.text,)


@pytest.fixture(scope="module")
def artifact() -> Frozen:
    return random_artifact(decoder_specs(QuantSpec(4, 32)))


def test_what_a_format_says_is_in_both_reports(artifact: Frozen, tmp_path: Path) -> None:
    earlier, directory = Note("freeze", "14 weights frozen to codes"), tmp_path / "out"
    recipe, journal = Recipe.load("w4a16-ptq"), Journal([earlier])
    report, told = write_artifact(directory, artifact, [Telling()], recipe=recipe, journal=journal)
    assert told == (TOLD,)
    assert report.notes == (earlier, TOLD)
    saved = json.loads((directory / "gracec.json").read_text(encoding="utf-8"))["report"]
    assert [Note.of(note) for note in saved["notes"]] == [earlier, TOLD]
    assert read_artifact(directory)[1] == report


def test_what_was_written_is_checked_before_it_is_there(artifact: Frozen, tmp_path: Path) -> None:
    recipe, out = Recipe.load("w4a16-ptq"), tmp_path / "out"

    def refuse(directory: Path) -> Equal:
        assert read_artifact(directory) and not out.exists()
        raise GateError("it is another")

    with pytest.raises(GateError, match="it is another"):
        write_artifact(out, artifact, (), recipe=recipe, journal=Journal(), check=refuse)
    assert not list(tmp_path.iterdir())
    figure = Equal(7, "days")
    report, _ = write_artifact(
        out, artifact, (), recipe=recipe, journal=Journal(), check=lambda directory: figure
    )
    assert report.gates == read_artifact(out)[1].gates == {"reloaded_equals_compiled": figure}


def test_a_report_that_is_there_already_is_saved_as_it_is(artifact: Frozen, tmp_path: Path) -> None:
    recipe, journal = Recipe.load("w4a16-ptq"), Journal()
    report, _ = write_artifact(tmp_path / "a", artifact, (), recipe=recipe, journal=journal)
    again, told = write_artifact(tmp_path / "b", artifact, [Telling()], report)
    assert told == (TOLD,)
    assert again == report == read_artifact(tmp_path / "b")[1]


def test_a_format_is_asked_before_anything_is_written(artifact: Frozen, tmp_path: Path) -> None:
    recipe, journal = Recipe.load("w4a16-ptq"), Journal()
    with pytest.raises(GracecError, match="format hf: it holds no decoders; choose other formats"):
        write_artifact(
            tmp_path / "out",
            artifact,
            [Telling("it holds no decoders")],
            recipe=recipe,
            journal=journal,
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(artifact: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "a"
    recipe = Recipe.load("w4a16-ptq")
    write_artifact(directory, artifact, (), recipe=recipe, journal=Journal())
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_every_file_of_a_directory_has_its_hash(saved: Path) -> None:
    files = read_manifest(saved).files
    assert [*files, "gracec.json"] == [*sorted(files), "gracec.json"]
    assert {*files, "gracec.json"} == set(files_in(saved))
    assert {"config.json", "generation_config.json", "tokenizer.json", TENSORS} <= files.keys()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ("config.json", "}", "}" + "]" * 1000),
        ("processor_config.json", '"image_mean": [', '"image_mean": [ '),
        ("chat_template.jinja", "{", " {"),
        ("generation_config.json", "{", "{ "),
    ],
)
def test_what_is_read_beside_the_tensors_is_what_was_written(
    copied: Path, name: str, old: str, new: str
) -> None:
    file = copied / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(GracecError, match=f"{file}: the file is not the one that was written"):
        gracec.load(copied)


def test_a_user_changes_the_template_on_the_loaded_model(copied: Path, tmp_path: Path) -> None:
    """As the message says, and other files are theirs."""
    (copied / "README.md").write_text("mine")
    (copied / "notes.txt").write_text("mine")
    loaded = gracec.load(copied)
    loaded.processor.chat_template = "{{ 'changed' }}"
    loaded.save_pretrained(tmp_path / "changed", formats=())
    assert gracec.load(tmp_path / "changed").processor.chat_template == "{{ 'changed' }}"
    (copied / "chat_template.json").write_text("{}")
    with pytest.raises(GracecError, match=r"chat_template\.json: the file was not written with"):
        gracec.load(copied)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("model.language_model.norm.weight", lambda t: t.repeat(2), r"is \[\d+\], the model has"),
        ("model.language_model.norm.weight", lambda t: t * torch.nan, "values that are not finite"),
        ("model.language_model.norm.weight", lambda t: t.int(), "is torch.int32"),
        ("model.language_model.norm.weight", lambda t: None, "is missing"),
        ("model.abacus", lambda t: torch.ones(1), "the model has no model.abacus"),
        (f"{Q}.codes", lambda t: t[:16], f"{Q}.scales are float32"),
    ],
)
def test_a_tensor_that_does_not_fit_the_model_is_named(
    copied: Path, name: str, change: Callable[[Any], Any], expected: str
) -> None:
    """With all hashes made anew."""
    tensors = load_file(copied / TENSORS)
    changed = {**tensors, name: change(tensors.get(name))}
    found = {key: value.contiguous() for key, value in changed.items() if value is not None}
    save_file(found, copied / TENSORS)
    reseal(copied)
    with pytest.raises(GracecError, match=expected) as error:
        gracec.load(copied)
    assert str(error.value).startswith(str(copied / TENSORS))


def test_codes_and_scales_of_another_width(copied: Path) -> None:
    tensors = load_file(copied / TENSORS)
    found = {key: t[:16].contiguous() if key.startswith(Q) else t for key, t in tensors.items()}
    save_file(found, copied / TENSORS)
    reseal(copied)
    with pytest.raises(GracecError, match=rf"{Q} is \[16, \d+\], the model has \[\d+, \d+\]"):
        gracec.load(copied)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda report: report.pop("plan"), "plan: Field required"),
        (lambda report: report.update(plan=[{"part": 1}]), "plan.0.fqns: Field required"),
        (lambda report: report.update(notes=[1]), "notes.0"),
        (lambda report: report["recipe"]["deploy"].update(dtype="complex"), "recipe.deploy.dtype"),
        (lambda report: report.update(gates={"x": {"kind": "error"}}), "gates.x: value: Field"),
        (lambda report: report.update(sizes={"compiled": "x"}), "sizes.compiled: Input should"),
    ],
)
def test_a_report_with_a_wrong_field_is_one_line(
    copied: Path, change: Callable[[Any], Any], expected: str
) -> None:
    report = json.loads((copied / "gracec.json").read_text())["report"]
    change(report)
    reseal(copied, report=report)
    for read in (gracec.load, inspect_artifact):
        with pytest.raises(GracecError, match=re.escape(expected)) as error:
            read(copied)
        assert str(error.value).startswith(f"{copied / 'gracec.json'}: report")


@pytest.mark.parametrize("formats", ["", "hf"])
def test_a_model_without_a_processor_is_saved_and_loaded(
    artifact: Frozen, formats: str, tmp_path: Path
) -> None:
    bare, recipe = replace(artifact, processor=None), Recipe.load("w4a16-ptq")
    wanted = parse_formats(formats) if formats else []
    write_artifact(tmp_path / "a", bare, wanted, recipe=recipe, journal=Journal())
    loaded = gracec.load(tmp_path / "a")
    assert loaded.processor is None and len(loaded.weights) == len(artifact.weights)


def test_what_a_killed_save_left_is_in_the_notes(artifact: Frozen, tmp_path: Path) -> None:
    (tmp_path / ".a.gracec" / "new").mkdir(parents=True)
    (tmp_path / ".a.gracec" / "new" / "part").write_text("12345")
    journal = Journal()
    options: dict[str, Any] = {"recipe": Recipe.load("w4a16-ptq"), "journal": journal}
    report, notes = write_artifact(tmp_path / "a", artifact, (), **options)
    left = Note("", f"removed {tmp_path}/.a.gracec/new, 5 B that a killed process left")
    assert left in notes and left in report.notes
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
