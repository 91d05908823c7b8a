"""What stands between a model and its compilation: checks in order, none of which ever raises.

Checks that read no weights run on a model of stand-ins, so that a broken checkpoint does not hide
what else is wrong.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from gracec.backends.base import Format, all_formats, signed_refusal
from gracec.capture import GENERIC, capture, captured_equals_eager, families, family_of
from gracec.data.prompts import encode_questions
from gracec.errors import GracecError
from gracec.frozen import Frozen
from gracec.ir.program import Program
from gracec.models.devices import device_named, dtype_named
from gracec.models.hub import find_model
from gracec.models.loading import EITHER, load_config, load_processor
from gracec.models.weight_files import checkpoint_files, checkpoint_tensors, first_not_finite
from gracec.passes import parse_placed, run_passes
from gracec.passes.plan_quantization import Plan, plan_of
from gracec.recipe import Recipe, known_recipes
from gracec.report.memory import size
from gracec.stages.pipelines import ANALYSIS, planning
from gracec.stages.prepare import Prepared
from gracec.stages.source import Source, stand_in_source, weights_source
from gracec.store import is_artifact
from gracec.targets.base import TARGETS, Target

OK, BLOCKED, SKIPPED = "ok", "blocked", "skipped"
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        status: "ok", "blocked", or "skipped" because something before it is blocked.
        detail: one line: what was found, or what blocks and how to get past it.
        needed: whether `gracec compile` needs it.
    """

    name: str
    status: str
    detail: str
    needed: bool = True

    def line(self) -> str:
        """For people."""
        return f"{self.status:8} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Diagnosis:
    """All findings on one model, in order."""

    model: str
    checks: tuple[Check, ...]

    @property
    def compiles(self) -> bool:
        """Whether nothing that `gracec compile` needs is blocked."""
        return all(check.status == OK for check in self.checks if check.needed)

    def verdict(self) -> str:
        """One line."""
        blocked = [c.name for c in self.checks if c.needed and c.status == BLOCKED]
        return "gracec can compile it" if self.compiles else f"blocked by: {', '.join(blocked)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        checks = [
            {"name": c.name, "status": c.status, "detail": c.detail, "needed": c.needed}
            for c in self.checks
        ]
        return {"model": self.model, "compiles": self.compiles, "checks": checks}


class _Skip(Exception):
    """Raised by a check that needs what an earlier one did not get."""


def diagnose(
    directory: str | Path,
    recipe: str | Path | Recipe = "w4a16-ptq",
    report: Callable[[Check], None] = lambda check: None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Diagnosis:
    """Examine a directory, or a repository of the Hugging Face Hub, whatever it is.

    Args:
        recipe: the one that has to be open; the others are looked at as well.
        report: called with each finding as it is made.
        revision, device, dtype: as `gracec.compile` takes them.

    Raises:
        GracecError: for an unknown recipe, device or dtype, and for nothing else.
    """
    chosen, place, precision = Recipe.load(recipe), device_named(device), dtype_named(dtype)
    checks: list[Check] = []
    patient = _Patient(Path(directory), chosen, directory, revision, place, precision)
    # Without a kernel for them, compiled weights run dense: slower, not impossible. And who needs
    # one format or target does not need the others.
    steps = [
        (name, step, name == "format gracec" or name.partition(" ")[0] not in ("format", "target"))
        for name, step in patient.steps().items()
    ]
    for other in [chosen.name, *(name for name in known_recipes() if name != chosen.name)]:
        step = _recipe_step(patient, chosen if other == chosen.name else other)
        steps.append((f"recipe {other}", step, other == chosen.name))
    for name, step, needed in steps:
        checks.append(_run(name, step, needed))
        report(checks[-1])
    return Diagnosis(str(directory), tuple(checks))


def _run(name: str, step: Callable[[], str], needed: bool) -> Check:
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            detail = step()
        notes = [str(item.message) for item in warned if "gracec" in item.category.__module__]
        return Check(name, OK, "; ".join(_one_line(text) for text in (detail, *notes)), needed)
    except _Skip as reason:
        return Check(name, SKIPPED, str(reason), needed)
    except GracecError as error:
        return Check(name, BLOCKED, _one_line(str(error)), needed)
    except Exception as error:  # never a traceback: this is a list of what is wrong
        return Check(name, BLOCKED, _one_line(f"{type(error).__name__}: {error}"), needed)


def _one_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


@dataclass
class _Patient:
    """A directory and what the checks have got from it so far."""

    directory: Path
    recipe: Recipe
    named: str | Path
    revision: str | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    config: Any = None
    model: PreTrainedModel | None = None
    weights_model: PreTrainedModel | None = None
    batch: Mapping[str, Tensor] | None = None
    program: Program | None = None
    analyzed: Program | None = None
    planned: Program | None = None
    plan: Plan | None = None
    processor: Any = None
    files: list[Path] = field(default_factory=list)
    name: str = ""

    def steps(self) -> dict[str, Callable[[], str]]:
        """Name -> check, in order."""
        targets, formats = TARGETS.all(), all_formats()
        return {
            "directory": self.check_directory,
            "vision-language model": self.check_model,
            "family": self.check_family,
            "checkpoint files": self.check_files,
            "checkpoint values": self.check_values,
            "weights": self.check_weights,
            "processor": self.check_processor,
            "capture": self.check_capture,
            "captured equals eager": self.check_gate,
            "partition": self.check_partition,
            "plan": self.check_plan,
            "format gracec": self.check_format_gracec,
            **{f"target {t}": partial(self.check_target, kind()) for t, kind in targets.items()},
            **{f"format {f}": partial(self.check_format, form) for f, form in formats.items()},
        }

    def check_directory(self) -> str:
        place = find_model(self.named, self.revision)
        self.directory, self.name = place.path, place.name
        if not self.directory.is_dir():
            raise GracecError("no such directory", where=str(self.directory), fix=EITHER)
        if is_artifact(self.directory):
            raise GracecError(
                "a gracec artifact, compiled already",
                fix="`gracec inspect` shows its report; give the directory it was compiled from",
            )
        file = self.directory / "config.json"
        if not file.is_file():
            raise GracecError("no config.json", fix="give a Hugging Face model directory")
        if not os.access(file, os.R_OK):
            raise GracecError("no permission to read it", where=str(file))
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise GracecError(f"not JSON: {error}", where=str(file)) from error
        if not isinstance(fields, dict):
            raise GracecError("not a JSON object", where=str(file))
        at = f" of revision {place.revision}" if place.revision else ""
        return f"config.json{at} is readable, model type {fields.get('model_type')!r}"

    def check_model(self) -> str:
        self.config = load_config(self.directory)
        model = stand_in_source(self.directory, self.recipe, self.dtype, self.device).model
        parts = ", ".join(
            f"{part} {getattr(config, 'model_type', '?')}"
            for part in ("vision", "text")
            if (config := getattr(self.config, f"{part}_config", None)) is not None
        )
        self.model = model
        count = sum(parameter.numel() for parameter in model.parameters())
        return f"{type(model).__name__} ({parts}), {count:,} parameters"

    def check_family(self) -> str:
        model = _need(self.model, "vision-language model")
        family = family_of(model)
        if family is not GENERIC:
            return f"{family.model_type}: {type(family).__module__}"
        try:
            family.example_batch(model)
        except GracecError:
            self.model = None  # nothing below can work
            raise
        known = ", ".join(sorted(families()))
        return (
            f"no adapter for {self.config.model_type!r}, there are {known}; the model's own "
            "forward is traced"
        )

    def check_files(self) -> str:
        _need(self.config, "vision-language model")
        files = checkpoint_files(self.directory)
        self.files = files
        stored = sum(file.stat().st_size for file in files)
        kinds = ", ".join(dict.fromkeys(file.suffix.removeprefix(".") for file in files))
        return f"{len(files)} {kinds} files, {size(stored)}"

    def check_values(self) -> str:
        if not self.files:
            raise _Skip("needs: checkpoint files")
        name = first_not_finite(checkpoint_tensors(self.files))
        if name:
            raise GracecError(f"{name} holds NaN or infinity", fix="check the checkpoint")
        return "every weight is finite"

    def check_weights(self) -> str:
        if not self.files:
            raise _Skip("needs: checkpoint files")
        model = weights_source(self.directory, self.recipe, self.dtype, self.device).model
        if self.model is not None:
            self.weights_model = model
        return f"all there, {str(model.dtype).removeprefix('torch.')}"

    def check_processor(self) -> str:
        model = _need(self.model, "family")
        processor = self.processor = load_processor(self.directory)
        edge = getattr(self.config.vision_config, "image_size", 64)
        picture = Image.new("RGB", (edge, edge) if isinstance(edge, int) else (64, 64), "teal")
        batch = encode_questions(processor, ["What is this?"], [picture])
        prepared = family_of(model).prepare(model, batch)  # image tokens against image features
        self.batch = batch
        tokens = int((prepared["input_ids"] == self.config.image_token_id).sum())
        return f"{type(processor).__name__}, {tokens} tokens an image as the model takes"

    def check_capture(self) -> str:
        model = _need(self.weights_model or self.model, "family")
        self.program = capture(model)
        nodes = len(self.program.graph.nodes)
        return f"vision, projector and decoder in one graph of {nodes} nodes"

    def check_gate(self) -> str:
        program = _need(self.program, "capture")
        model = _need(self.weights_model, "weights")
        count = captured_equals_eager(program, model)
        if self.batch is not None:
            count += captured_equals_eager(program, model, [self.batch])
        return f"the same logits bit for bit on {count} batches"

    def check_partition(self) -> str:
        program = _need(self.program, "capture")
        result = run_passes(program, ANALYSIS)
        self.analyzed = result.program
        return "; ".join(note.text for note in result.notes)

    def check_plan(self) -> str:
        program = _need(self.analyzed, "partition")
        self.planned, detail = _planned(program, self.recipe)
        self.plan = plan_of(self.planned)
        return detail

    def check_format_gracec(self) -> str:
        plan = _need(self.plan, "plan")
        return f"codes and scales of {len(plan.quantized)} weights"

    def check_target(self, target: Target) -> str:
        frozen = self.frozen()
        reason = target.refusal(frozen)
        if reason:
            raise GracecError(reason)
        return target.summary(frozen) + _unsigned(frozen, target)

    def check_format(self, form: Format) -> str:
        frozen = self.frozen()
        reason = form.refusal(frozen)
        if reason:
            raise GracecError(reason)
        return f"can hold all of it{_unsigned(frozen, form)}"

    def frozen(self) -> Frozen:
        """What freezing would give, with stand-ins as codes and scales."""
        _need(self.plan, "plan")
        program, model = _need(self.planned, "plan"), _need(self.model, "family")
        source = Source(model, self.processor, self.name, 0)
        dtype: torch.dtype = getattr(torch, self.recipe.deploy.dtype)
        return Prepared(source, model, program).planned(dtype)


def _unsigned(frozen: Frozen, kind: Format | Target) -> str:
    """What `compile` would plan instead of signed scales, for who takes no negative ones."""
    return ", with unsigned scales" if signed_refusal(frozen, kind.holds_signed) else ""


def _need(found: T | None, step: str) -> T:
    if found is None:
        raise _Skip(f"needs: {step}")
    return found


def _planned(program: Program, recipe: Recipe) -> tuple[Program, str]:
    """A planned program and one line on its plan, fallbacks and refusals included."""
    result = run_passes(program, planning(recipe, analysis=()))
    *fallbacks, summary = (note.text for note in result.notes)
    if fallbacks:
        summary += f"; {len(fallbacks)} fallbacks, first: {fallbacks[0]}"
    if recipe.passes:
        summary += f"; before {', '.join(str(parse_placed(text).item) for text in recipe.passes)}"
    return result.program, f"{recipe.name}: {summary}"


def _recipe_step(patient: _Patient, recipe: str | Recipe) -> Callable[[], str]:
    def step() -> str:
        program = _need(patient.analyzed, "partition")
        return _planned(program, Recipe.load(recipe))[1].partition(": ")[2]

    return step
