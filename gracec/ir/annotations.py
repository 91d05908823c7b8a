"""What passes write on nodes, read as what it means.

Annotations are JSON-able (see `gracec.ir.program`); these functions are the only places that make
specs of them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from torch import fx

from gracec.ir.program import annotation
from gracec.quant.codes import QuantSpec
from gracec.quant.frozen import Experts
from gracec.quant.observers import ActivationSpec


def quant_of(node: fx.Node) -> QuantSpec | None:
    """How the weight of a matmul is quantized, if it is planned."""
    fields = annotation(node).get("quant")
    return None if fields is None else QuantSpec(**fields)


def act_of(node: fx.Node) -> ActivationSpec | None:
    """How the input of a matmul is quantized, or a quantized activation itself."""
    fields = annotation(node).get("act")
    return None if fields is None else ActivationSpec(**fields)


def experts_of(node: fx.Node) -> Experts | None:
    """How the model holds the weight of routed experts, if it is planned."""
    notes = annotation(node)
    if "experts" not in notes:
        return None
    return Experts(notes["experts"], notes.get("transposed", False))


def experts_notes(experts: Experts | None) -> dict[str, Any]:
    """What `experts_of` reads, as values of annotations."""
    if experts is None:
        return {"experts": None, "transposed": None}
    return {"experts": experts.count, "transposed": experts.transposed or None}


def planned_quant(node: fx.Node) -> QuantSpec:
    """That of a node that is known to be planned."""
    spec = quant_of(node)
    assert spec is not None, f"{node.name} has no plan"
    return spec


def planned_act(node: fx.Node) -> ActivationSpec:
    """That of a node whose activation is known to be planned."""
    spec = act_of(node)
    assert spec is not None, f"the input of {node.name} has no plan"
    return spec


class Part(StrEnum):
    """What a weight of a model is for. Recipes have rules for the first five."""

    VISION = "vision"
    PROJECTOR = "projector"
    DECODER = "decoder"
    HEAD = "head"
    MODULE = "module"
    """All of a model that is no vision-language model."""
    TEXT = "text"
    """On the way of the text before it meets the image."""
    EMBEDDING = "embedding"
    """Looked up, not multiplied."""
    UNUSED = "unused"
    """The logits do not depend on it."""
    OTHER = "other"


def known_part(node: fx.Node) -> Part:
    """That of a node that is known to be analysed."""
    return Part(annotation(node)["part"])


def part_of(node: fx.Node) -> Part | None:
    """The part that a matmul belongs to, once the model is analysed."""
    found = annotation(node).get("part")
    return None if found is None else Part(found)
