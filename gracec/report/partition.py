"""What a model consists of and what a recipe would do to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import fx
from transformers import PreTrainedModel

from gracec.ir.annotations import Part, part_of
from gracec.ir.program import Program, annotation
from gracec.passes.plan_quantization import Plan
from gracec.report.memory import MemoryPlan, size
from gracec.report.report import coverage_table
from gracec.report.rows import PlanRow
from gracec.report.training_plan import TrainingPlan

MODALITY = {
    Part.VISION: "vision",
    Part.PROJECTOR: "vision",
    Part.EMBEDDING: "text",
    Part.TEXT: "text",
    Part.DECODER: "fused",
    Part.HEAD: "fused",
    Part.OTHER: "",
    Part.UNUSED: "",
}
"""Part -> what it works on, in the order of the data; no logit depends on what is unused."""
_BY_MODALITY = {"vision": Part.VISION, "text": Part.EMBEDDING, "fused": Part.DECODER}


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
        training: on one GPU, where the recipe trains.
    """

    model: str
    architecture: str
    family: str
    dtype: str
    recipe: str
    blocks: int
    parts: tuple[PartSummary, ...]
    tied: tuple[tuple[str, ...], ...]
    plan: tuple[PlanRow, ...]
    coverage: float
    notes: tuple[str, ...]
    memory: MemoryPlan
    training: TrainingPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        plan = [row.to_dict() for row in self.plan]
        training = None if self.training is None else self.training.to_dict()
        memory = self.memory.to_dict()
        return {**asdict(self), "plan": plan, "memory": memory, "training": training}

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


def partition(model: PreTrainedModel, program: Program, plan: Plan) -> tuple[PartSummary, ...]:
    """Every parameter of a model in exactly one part, in the order of the data.

    A weight is where the plan has it. Everything else (biases, norms, position tables) belongs to
    the part of the first node that uses it and is coloured.
    """
    entries = {entry.fqn: entry for entry in plan.entries}
    used = _ancestors(program.node(role="logits"))
    owner: dict[str, Part] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        for name in program.fqns.get(str(node.target), ()):
            part = _part(node, used)
            if owner.get(name, Part.UNUSED) == Part.UNUSED:  # an alias without users says nothing
                owner[name] = part
    parts: dict[Part, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        entry = entries.get(name)
        part = owner.get(name, Part.UNUSED)
        if entry is not None and entry.part != Part.EMBEDDING:
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
    return tuple(PartSummary(part.value, MODALITY[part], **parts[part]) for part in known)


_COUNTS = (
    "tensors",
    "parameters",
    "bytes",
    "weights",
    "quantized_weights",
    "quantized_bytes",
    "planned_bytes",
)


def _part(node: fx.Node, used: set[fx.Node]) -> Part:
    """The part that a parameter belongs to by the nodes that use it."""
    if node not in used:
        return Part.UNUSED
    seen, waiting = {node}, [node]
    for current in waiting:  # breadth first: grows while it is walked
        part, modality = part_of(current), annotation(current).get("modality")
        if part is not None:
            return part
        if modality is not None:
            return _BY_MODALITY[modality]
        following = [user for user in current.users if user in used and user not in seen]
        seen.update(following)
        waiting += following
    return Part.UNUSED


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and everything that it depends on."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found
