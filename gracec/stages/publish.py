"""publish: a frozen model becomes a directory, in one step of the file system.

DIR/gracec.json, DIR/gracec/    the canonical codes and scales, which `read_artifact` reads
DIR/...                         formats for other libraries
DIR.failed                      instead, if the accuracy is below what the recipe expects
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from gracec._version import __version__
from gracec.backends.base import Format, check_formats
from gracec.errors import GracecError
from gracec.frozen import Frozen, build
from gracec.journal import Journal, Note
from gracec.models.loading import load_processor
from gracec.models.lora import attach_adapters
from gracec.models.skeleton import skeleton
from gracec.recipe import Recipe
from gracec.report import Report
from gracec.report.card import model_card
from gracec.store import Store, read_store, write_directory, write_store


def write_artifact(
    directory: Path,
    frozen: Frozen,
    formats: Sequence[Format],
    report: Report | None = None,
    *,
    recipe: Recipe | None = None,
    journal: Journal | None = None,
    overwrite: bool = False,
) -> tuple[Report, tuple[Note, ...]]:
    """Write the canonical artifact and formats for other libraries.

    Args:
        report: to be saved as it is.
        recipe, journal: what to make it from instead, once the formats have said what they have to.
        overwrite: replace an artifact that is there.

    Returns:
        The report that was saved, and the notes of the formats.

    Raises:
        GracecError: if the directory exists, a format cannot hold the weights, or the disk does
            not take it. Nothing half-written is left.
    """
    check_formats(formats, frozen)
    saved: list[Report] = []
    notes: list[Note] = []

    def fill(target: Path) -> None:
        notes.extend(_write_formats(frozen, formats, target))
        if report is None:
            assert recipe is not None and journal is not None
            journal.extend(notes)
            saved.append(Report.of(recipe, journal))
        else:
            saved.append(report)
        for form in formats:
            facts = form.card(frozen) if frozen.weights else None
            if facts is not None:
                card = model_card(saved[0], facts, source=frozen.name, form=form.name)
                (target / form.folder / "README.md").write_text(card, encoding="utf-8")
        manifest = {
            "gracec": __version__,
            "torch": torch.__version__,
            "family": frozen.config.model_type,
            "source": frozen.name,
            "report": saved[0].to_dict(),
            "formats": {form.name: form.folder for form in formats},
            **({"passes": list(frozen.passes)} if frozen.passes else {}),
        }
        write_store(Store(frozen.weights, frozen.others, manifest, frozen.adapters), target)

    write_directory(directory, fill, overwrite=overwrite)
    return saved[0], tuple(notes)


def write_formats(directory: Path, frozen: Frozen, formats: Sequence[Format]) -> tuple[Note, ...]:
    """Write formats for other libraries alone, without the canonical codes."""
    check_formats(formats, frozen)
    notes: list[Note] = []
    write_directory(directory, lambda target: notes.extend(_write_formats(frozen, formats, target)))
    return tuple(notes)


def read_artifact(directory: Path) -> tuple[Frozen, Report]:
    """What `write_artifact` wrote.

    Raises:
        GracecError: if the directory is not a whole artifact.
    """
    store = read_store(directory)
    report = Report.from_dict(store.manifest["report"])
    dtype: torch.dtype = getattr(torch, report.recipe["deploy"]["dtype"])
    model = skeleton(AutoConfig.from_pretrained(directory, local_files_only=True), dtype)
    attach_adapters(model, store.adapters, store.others)
    expected = {name for name, _ in model.named_parameters()}
    missing = sorted(expected - {*store.weights, *store.others})
    if missing:
        raise GracecError(f"{missing[0]} is missing", where=str(directory))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    frozen = Frozen(
        model,
        store.weights,
        store.others,
        dtype,
        processor=load_processor(directory),
        name=store.manifest["source"],
        passes=tuple(store.manifest.get("passes", ())),
    )
    return frozen, report


def _write_formats(frozen: Frozen, formats: Sequence[Format], target: Path) -> list[Note]:
    """The files of each format, and an ordinary configuration where none writes the top level."""
    notes: list[Note] = []
    plain = not frozen.weights and any(not form.folder for form in formats)
    for form in () if plain else formats:
        notes += [Note(form.name, text) for text in form.write(frozen, target / form.folder)]
    if plain:  # nothing is quantized: an ordinary model, which everything loads
        build(frozen).save_pretrained(target)
        notes.append(Note("", "nothing is quantized: an ordinary Hugging Face model"))
    elif all(form.folder for form in formats):  # else the top level is written
        frozen.config.save_pretrained(target)
    if plain or all(form.folder for form in formats):
        if frozen.generation_config is not None:
            frozen.generation_config.save_pretrained(target)
        if frozen.processor is not None:
            frozen.processor.save_pretrained(target)
    for form in formats:
        form.finish(frozen, target)
    return notes
