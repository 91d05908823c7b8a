"""write_artifact: what formats say reaches the caller, the report in memory and the saved one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from gracec.backends.base import CardFacts
from gracec.backends.compressed_tensors import HuggingFace
from gracec.errors import GracecError
from gracec.frozen import Frozen
from gracec.journal import Journal, Note
from gracec.quant import QuantSpec
from gracec.recipe import Recipe
from gracec.stages.publish import read_artifact, write_artifact
from tests.backends.artifacts import decoder_specs, random_artifact

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
