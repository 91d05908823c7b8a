"""publish: a frozen model becomes a directory, in one step of the file system.

DIR/gracec.json, DIR/gracec/    the canonical codes and scales, which `read_artifact` reads
DIR/...                         formats for other libraries
DIR.failed                      instead, if the accuracy is below what the recipe expects
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gracec._version import __version__
from gracec.backends.base import Format, check_formats
from gracec.directories import MANIFEST, clear_leftovers, write_directory
from gracec.errors import GracecError
from gracec.file_hashes import PROCESSOR, read_names
from gracec.frozen import Frozen, build
from gracec.journal import Figure, Journal, Note
from gracec.models.configs import read_config, read_generation_config
from gracec.models.loading import load_processor
from gracec.models.lora import attach_adapters
from gracec.models.skeleton import skeleton
from gracec.models.weight_files import first_not_finite
from gracec.recipe import OnnxDeploy, Recipe
from gracec.report import Report
from gracec.report.card import model_card
from gracec.report.saved import read_report
from gracec.store import TENSORS, Store, change_manifest, read_store, write_store


def write_artifact(
    directory: Path,
    frozen: Frozen,
    formats: Sequence[Format],
    report: Report | None = None,
    *,
    recipe: Recipe | None = None,
    journal: Journal | None = None,
    overwrite: bool = False,
    check: Callable[[Path], Figure] | None = None,
) -> tuple[Report, tuple[Note, ...]]:
    """Write the canonical artifact and formats for other libraries.

    Args:
        report: to be saved as it is.
        recipe, journal: what to make it from instead, once the formats have said what they have to.
        overwrite: replace an artifact that is there.
        check: the gate on what was written, before it is put in place; its figure is in the report.

    Returns:
        The report that was saved, and the notes of the formats.

    Raises:
        GracecError: if the directory exists, a format cannot hold the weights, or the disk does
            not take it. Nothing half-written is left.
    """
    frozen = frozen.to(torch.device("cpu"))
    check_formats(formats, frozen)
    saved: list[Report] = []
    notes = [Note("", text) for text in clear_leftovers(directory)]

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
                card = model_card(
                    saved[0],
                    facts,
                    source=frozen.name,
                    revision=frozen.revision,
                    form=form.name,
                )
                (target / form.folder / "README.md").write_text(
                    card, encoding="utf-8", errors="backslashreplace"
                )
        manifest = {
            "gracec": __version__,
            "torch": torch.__version__,
            "family": frozen.config.model_type,
            "source": frozen.name,
            "report": saved[0].to_dict(),
            "formats": {form.name: form.folder for form in formats},
            **({"revision": frozen.revision} if frozen.revision else {}),
            **({"passes": list(frozen.passes)} if frozen.passes else {}),
        }
        write_store(Store(frozen.weights, frozen.others, manifest, frozen.adapters), target)
        if check is not None:
            assert recipe is not None and journal is not None
            journal.figures["reloaded_equals_compiled"] = check(target)
            saved[0] = Report.of(recipe, journal)
            change_manifest(target, report=saved[0].to_dict())

    write_directory(directory, fill, overwrite=overwrite)
    return saved[0], tuple(notes)


def write_formats(directory: Path, frozen: Frozen, formats: Sequence[Format]) -> tuple[Note, ...]:
    """Write formats for other libraries alone, without the canonical codes."""
    frozen = frozen.to(torch.device("cpu"))
    check_formats(formats, frozen)
    notes = [Note("", text) for text in clear_leftovers(directory)]
    write_directory(directory, lambda target: notes.extend(_write_formats(frozen, formats, target)))
    return tuple(notes)


def read_artifact(directory: Path) -> tuple[Frozen, Report]:
    """What `write_artifact` wrote.

    Raises:
        GracecError: if the directory is not a whole artifact.
    """
    store = read_store(directory)
    report = read_report(store.manifest["report"], where=str(directory / MANIFEST))
    dtype: torch.dtype = getattr(torch, report.recipe["deploy"]["dtype"])
    model = skeleton(read_config(directory), dtype)
    attach_adapters(model, store.adapters, store.others)
    _check_tensors(model, store, directory / TENSORS)
    generation_config = read_generation_config(directory)
    if generation_config is not None:
        model.generation_config = generation_config
    frozen = Frozen(
        model,
        store.weights,
        store.others,
        dtype,
        # One that was compiled without a processor has none.
        processor=load_processor(directory) if read_names(directory, PROCESSOR) else None,
        name=store.manifest["source"],
        revision=store.manifest["revision"],
        passes=tuple(store.manifest["passes"]),
        onnx=_known(report.recipe["deploy"].get("onnx", {})),
    )
    return frozen, report


def _known(saved: Mapping[str, Any]) -> OnnxDeploy:
    """Of a saved recipe, which may be of a version with further fields."""
    return OnnxDeploy(**{name: saved[name] for name in OnnxDeploy.model_fields if name in saved})


def _check_tensors(model: PreTrainedModel, store: Store, path: Path) -> None:
    """Hold names, shapes and dtypes to the model of the configuration, and floats to be finite.

    Raises:
        GracecError: naming the first tensor that is missing, unknown or does not fit.
    """
    where, fix = str(path), "compile the model again"
    parameters, state = dict(model.named_parameters()), model.state_dict()
    found = {*store.weights, *store.others}
    for name in sorted(parameters.keys() - found):
        raise GracecError(f"{name} is missing", where=where, fix=fix)
    for name in sorted(found - state.keys()):
        raise GracecError(f"the model has no {name}", where=where, fix=fix)
    shapes = {name: weight.held_shape for name, weight in store.weights.items()}
    shapes |= {name: tensor.shape for name, tensor in store.others.items()}
    for name, shape in sorted(shapes.items()):
        if shape != state[name].shape:
            there, here = list(shape), list(state[name].shape)
            raise GracecError(f"{name} is {there}, the model has {here}", where=where, fix=fix)
    for name, tensor in store.others.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise GracecError(f"{name} is {tensor.dtype}", where=where, fix=fix)
    broken = first_not_finite(
        (name, store.others[name]) for name in parameters if name in store.others
    )
    if broken:
        raise GracecError(f"{broken} has values that are not finite", where=where, fix=fix)


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
    for form in () if plain else formats:
        form.seal(target)
    return notes
