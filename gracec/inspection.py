"""Look at a model or an artifact without reading a single weight."""

from __future__ import annotations

from pathlib import Path

import torch

from gracec.capture import capture
from gracec.models.hub import Named, find_description
from gracec.models.loading import configured_dtype, load_config
from gracec.passes.plan_quantization import plan_of
from gracec.planning import plan as plan_training
from gracec.recipe import Recipe
from gracec.report import Report
from gracec.report.memory import memory_plan
from gracec.report.partition import Inspection, partition
from gracec.report.rows import plan_rows
from gracec.report.saved import read_report
from gracec.stages.prepare import plan
from gracec.stages.source import stand_in_source
from gracec.store import MANIFEST, read_manifest
from gracec.training.planned_samples import Stated, stated_batch


def inspect_model(
    model: Named,
    recipe: str | Path | Recipe = "w4a16-ptq",
    *,
    batch: int = 1,
    images: int = 1,
    text: int = 128,
) -> Inspection:
    """Look at a Hugging Face model.

    Args:
        model: a directory, or "org/name" of the Hugging Face Hub, of which no weight is fetched.
        recipe: what would be quantized.
        batch, images, text: prompts, images a prompt and text tokens a prompt of the memory plan.
            An image is one of 640 x 480 pixels, as many tokens as the processor makes of it.

    Raises:
        GracecError: if the model cannot be captured or the recipe does not fit it.
    """
    recipe = Recipe.load(recipe)
    place = find_description(model)
    shell = stand_in_source(place.path, recipe).model
    stated = Stated(images=images, text=text, answer=max(1, text // 2))
    length = stated_batch(shell, place.path, stated, 1)[0]["input_ids"].shape[1]
    captured = capture(shell)
    planned = plan(captured, recipe)
    found = plan_of(planned.program)
    return Inspection(
        model=str(place),
        architecture=type(shell).__name__,
        family=captured.family,
        dtype=str(captured.dtype).removeprefix("torch."),
        recipe=recipe.name,
        blocks=len(list(planned.program.nodes(role="block_output"))),
        parts=partition(shell, planned.program, found),
        tied=tuple(entry.fqns for entry in found.entries if len(entry.fqns) > 1),
        plan=plan_rows(found),
        coverage=found.coverage,
        training=None if recipe.training is None else plan_training(place, recipe, stated=stated),
        notes=(
            *map(str, planned.notes),
            *(f"compiling also runs {text}" for text in recipe.passes),
        ),
        memory=memory_plan(
            shell,
            found,
            getattr(torch, recipe.deploy.dtype),
            batch=batch,
            tokens=length,
            stored=configured_dtype(load_config(place.path)),
        ),
    )


def inspect_artifact(artifact: Named) -> Report:
    """The report that was saved with a gracec artifact.

    Args:
        artifact: its directory, or "org/name" of the Hugging Face Hub.

    Raises:
        GracecError: if it is none.
    """
    directory = find_description(artifact).path
    return read_report(read_manifest(directory).report, where=str(directory / MANIFEST))
