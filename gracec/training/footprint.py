"""How much a training keeps from step to step: parameters counted by what becomes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn
from transformers import PreTrainedModel

from gracec.ir.annotations import act_of
from gracec.ir.program import Program
from gracec.ir.queries import value, weight_of
from gracec.passes.plan_quantization import Plan
from gracec.recipe import Training
from gracec.training.rehearsal import block_numbers
from gracec.training.setup import trainable

MASTER = 4
"""Bytes of a master, a scale, and each of the two moments: float32."""


@dataclass(frozen=True)
class Count:
    """Numbers of parameters: those that the graph reads quantized, and others that learn or not."""

    quantized: int = 0
    plain: int = 0
    still: int = 0


@dataclass(frozen=True)
class Footprint:
    """Numbers of parameters of a student.

    Attributes:
        learning: FQNs of what the graph has gradients of.
        quantized: FQNs of weights that the graph reads quantized.
        masters: weights that learn, without scales.
        scales: scales that learn, of weights and of activations.
        others: parameters of the model that do not learn, and scales that do not.
        held: what the graph reads quantized, learning or not.
        with_gradient: of these, the ones that have gradients in the graph.
        plain: masters that the graph reads as they are.
        codes: bytes of codes, where scales alone learn.
        block, root: of the largest decoder block, and of all that is in none.
    """

    learning: frozenset[str]
    quantized: frozenset[str]
    masters: int
    scales: int
    others: int
    held: int
    with_gradient: int
    plain: int
    codes: int
    block: Count
    root: Count

    @classmethod
    def of(cls, model: PreTrainedModel, program: Program, found: Plan, rule: Training) -> Footprint:
        """Of a student.

        Args:
            model: whose parameters may be stand-ins.
            program: planned, and without fake-quantization.
            found: the plan.
        """
        entries = {entry.fqn: entry for entry in found.entries if entry.spec is not None}
        learning = trainable(program, rule.frozen)
        sizes = {name: parameter.numel() for name, parameter in learning.items()}
        with_gradient = sum(count for name, count in sizes.items() if name in entries)
        scales_alone = rule.learns == "scales"
        if scales_alone:
            sizes = {name: count for name, count in sizes.items() if name in entries}
        counts = {name: _scales(entry) for name, entry in entries.items()}
        scales = sum(count for name, count in counts.items() if name in sizes)
        scales += _input_scales(program, frozenset(sizes))
        masters = 0 if scales_alone else sum(sizes.values())
        total = sum(parameter.numel() for parameter in model.parameters())
        still = sum(count for name, count in counts.items() if name not in sizes)
        block, root = _by_place(program, frozenset(sizes), frozenset(entries))
        return cls(
            learning=frozenset(sizes),
            quantized=frozenset(entries),
            masters=masters,
            scales=scales,
            others=total - masters + still,
            held=sum(entry.numel for entry in entries.values()),
            with_gradient=with_gradient,
            plain=0 if scales_alone else masters - with_gradient,
            codes=sum(e.planned_bytes for e in entries.values()) if scales_alone else 0,
            block=block,
            root=root,
        )

    @property
    def learned(self) -> int:
        """Numbers that the optimizer changes."""
        return self.masters + self.scales


def _scales(entry: object) -> int:
    spec, shape = entry.spec, entry.shape  # type: ignore[attr-defined]
    rows, groups = spec.scale_shape(*shape)
    return int(rows * groups)


def _input_scales(program: Program, learning: frozenset[str]) -> int:
    """Scales of the inputs of quantized linears; linears that read one activation share them."""
    counts: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        spec, weight = act_of(node), weight_of(node)
        if spec is None or weight is None or program.fqn(str(weight.target)) not in learning:
            continue
        source = node.args[0]
        traced = value(source) if isinstance(source, fx.Node) else None
        if traced is not None and isinstance(source, fx.Node):
            counts[source] = spec.groups(int(traced.shape[-1]))
    return sum(counts.values())


def _by_place(
    program: Program, learning: frozenset[str], quantized: frozenset[str]
) -> tuple[Count, Count]:
    """Of the largest decoder block, and of all that is in none."""
    blocks, seen = block_numbers(program), set[str]()
    counts: dict[int | None, Counter[str]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        tensor, name = program.tensor(str(node.target)), program.fqn(str(node.target))
        if name in seen or not isinstance(tensor, nn.Parameter):
            continue
        seen.add(name)
        places = {blocks.get(user) for user in node.users}
        place = places.pop() if len(places) == 1 else None
        kind = "quantized" if name in quantized else "plain" if name in learning else "still"
        counts.setdefault(place, Counter())[kind] += tensor.numel()
    root = Count(**counts.pop(None, Counter()))
    largest = max(counts.values(), key=lambda one: one.total(), default=Counter())
    return Count(**largest), root
