"""What a model consists of and what a recipe would do to it, without reading a single weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import fx
from transformers import PreTrainedModel

from gracec.capture import capture
from gracec.errors import GracecError
from gracec.models import configured_dtype, load_config, model_without_weights, untie_head
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.plan_quantization import Plan, PlanQuantization, plan_of
from gracec.program import Program, annotation
from gracec.recipe import Recipe
from gracec.report.memory import MemoryPlan, memory_plan, size
from gracec.report.report import Report, coverage_table, plan_rows
from gracec.store import read_manifest

MODALITY = {
    "vision": "vision",
    "projector": "vision",
    "embedding": "text",
    "text": "text",
    "decoder": "fused",
    "head": "fused",
    "other": "",
    "unused": "",
}
"""Part -> what it works on, in the order of the data; no logit depends on what is unused."""
_BY_MODALITY = {"vision": "vision", "text": "embedding", "fused": "decoder"}


@dataclass(frozen=True)
class PartSummary:
    """One part of a model.

    Attributes:
        tensors, parameters, bytes: of everything in it, biases and norms included, in the dtype it
            is loaded in.
        weights: matrices that are multiplied with, or looked up.
        quantized_weights, quantized_bytes: those that the plan quantizes.
        planned_bytes: bytes of the part when they are.
    """

    part: str
    modality: str
    tensors: int
    parameters: int
    bytes: int
    weights: int
    quantized_weights: int
    quantized_bytes: int
    planned_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The partition, the plan and the memory plan of a model.

    Attributes:
        blocks: of the decoder.
        tied: names that share one parameter, first name first.
        coverage: share of the bytes of all matmul-like weights that is quantized.
        notes: what the passes decided: fallbacks and refusals, each with its reason.
    """

    model: str
    architecture: str
    family: str
    dtype: str
    recipe: str
    blocks: int
    parts: tuple[PartSummary, ...]
    tied: tuple[tuple[str, ...], ...]
    plan: list[dict[str, Any]]
    coverage: float
    notes: tuple[str, ...]
    memory: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "memory": self.memory.to_dict()}

    def partition_table(self) -> Table:
        """One row a part."""
        table = Table("part", "modality", "tensors", "parameters", "bytes", "share")
        for name in ("tensors", "parameters", "bytes", "share"):
            column = next(column for column in table.columns if column.header == name)
            column.justify = "right"
        total = sum(part.bytes for part in self.parts)
        for part in self.parts:
            table.add_row(
                part.part,
                part.modality or "-",
                str(part.tensors),
                f"{part.parameters:,}",
                size(part.bytes),
                f"{part.bytes / total:.1%}",
            )
        return table

    def plan_table(self) -> Table:
        """Bytes of matmul-like weights by part: quantized, kept, and why."""
        return coverage_table(self.plan)


def inspect_model(
    directory: Path,
    recipe: str | Path | Recipe = "w4a16-ptq",
    *,
    batch: int = 1,
    images: int = 1,
    text: int = 128,
) -> Inspection:
    """Look at a Hugging Face directory.

    Args:
        recipe: what would be quantized.
        batch, images, text: prompts, images a prompt and text tokens a prompt of the memory plan.

    Raises:
        GracecError: if the model cannot be captured or the recipe does not fit it.
    """
    recipe = Recipe.load(recipe)
    model = model_without_weights(directory)
    if recipe.quantizes("head"):
        untie_head(model)
    captured = capture(model)
    planned = run_passes(captured, [AnalyzeModality(), PlanQuantization(recipe=recipe)])
    plan = plan_of(planned.program)
    return Inspection(
        model=str(directory),
        architecture=type(model).__name__,
        family=captured.family,
        dtype=str(captured.dtype).removeprefix("torch."),
        recipe=recipe.name,
        blocks=len(list(planned.program.nodes(role="block_output"))),
        parts=partition(model, planned.program, plan),
        tied=tuple(entry.fqns for entry in plan.entries if len(entry.fqns) > 1),
        plan=plan_rows(plan),
        coverage=plan.coverage,
        notes=planned.notes,
        memory=memory_plan(
            model,
            plan,
            getattr(torch, recipe.deploy.dtype),
            batch=batch,
            images=images,
            text=text,
            stored=configured_dtype(load_config(directory)),
        ),
    )


def inspect_artifact(directory: Path) -> Report:
    """The report that was saved with a gracec artifact.

    Raises:
        GracecError: if the directory holds none.
    """
    try:
        return Report(**read_manifest(directory)["report"])
    except (KeyError, TypeError) as error:
        raise GracecError("the manifest holds no report", where=str(directory)) from error


def partition(model: PreTrainedModel, program: Program, plan: Plan) -> tuple[PartSummary, ...]:
    """Every parameter of a model in exactly one part, in the order of the data.

    A weight is where the plan has it. Everything else (biases, norms, position tables) belongs to
    the part of the first node that uses it and is coloured.
    """
    entries = {entry.fqn: entry for entry in plan.entries}
    used = _ancestors(program.node(role="logits"))
    owner: dict[str, str] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        for name in program.fqns.get(str(node.target), ()):
            part = _part(node, used)
            if owner.get(name, "unused") == "unused":  # an alias without users says nothing
                owner[name] = part
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        entry = entries.get(name)
        part = owner.get(name, "unused")
        if entry is not None and entry.part != "embedding":
            part = entry.part
        count = parameter.numel() * parameter.element_size()
        spec = entry.spec if entry is not None else None
        row = parts.setdefault(part, dict.fromkeys(_COUNTS, 0))
        row["tensors"] += 1
        row["parameters"] += parameter.numel()
        row["bytes"] += count
        row["weights"] += entry is not None
        row["quantized_weights"] += spec is not None
        row["quantized_bytes"] += count if spec is not None else 0
        row["planned_bytes"] += entry.planned_bytes if entry is not None else count
    known = [part for part in MODALITY if part in parts]
    return tuple(PartSummary(part, MODALITY[part], **parts[part]) for part in known)


_COUNTS = (
    "tensors",
    "parameters",
    "bytes",
    "weights",
    "quantized_weights",
    "quantized_bytes",
    "planned_bytes",
)


def _part(node: fx.Node, used: set[fx.Node]) -> str:
    """The part that a parameter belongs to by the nodes that use it."""
    if node not in used:
        return "unused"
    seen, waiting = {node}, [node]
    for current in waiting:  # breadth first: grows while it is walked
        notes = annotation(current)
        if "part" in notes:
            return str(notes["part"])
        if "modality" in notes:
            return _BY_MODALITY[notes["modality"]]
        following = [user for user in current.users if user in used and user not in seen]
        seen.update(following)
        waiting += following
    return "unused"


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and everything that it depends on."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found
