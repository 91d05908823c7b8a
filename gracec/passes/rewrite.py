"""Rewrite rules: what might match, what does match or why not, and what takes its place.

    candidate --match--> operands --apply--> the graph without it
                     \\-> Mismatch(reason)     the graph as it was

An anchor is cheap and generous, so that whatever a reader of the graph would take for an instance
of the rule is a candidate; the match is exact and says what is different. So nothing that looks
like an instance stays without a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import fx

from gracec.ir.program import Program

Operands = TypeVar("Operands")


class Mismatch(Exception):
    """Why a candidate is no instance of a rule: half a line, without a full stop."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Rewrite(Generic[Operands]):
    """One rule.

    Attributes:
        name: what is rewritten, in the singular, as the notes say it.
        is_candidate: the anchor. It changes nothing.
        match: the operands of a candidate, or `Mismatch` is raised. It changes nothing.
        apply: put something else in the place of the candidate. It may leave it behind unused.
    """

    name: str
    is_candidate: Callable[[fx.Node], bool]
    match: Callable[[fx.Node], Operands]
    apply: Callable[[Program, fx.Node, Operands], None]


class Kept(NamedTuple):
    """A candidate that stays, by the names of its rule and its node."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class Rewritten:
    """What became of the candidates.

    Attributes:
        counts: name of a rule -> how many candidates it has rewritten; every rule is there.
        kept: the others, in the order of the rules and of the graph.
    """

    counts: dict[str, int]
    kept: tuple[Kept, ...]

    @property
    def modified(self) -> bool:
        return any(self.counts.values())

    @property
    def refusals(self) -> list[str]:
        """One line for each reason: how many stay for it, and the first of them."""
        alike: dict[tuple[str, str], list[str]] = {}
        for rule, node, reason in self.kept:
            alike.setdefault((rule, reason), []).append(node)
        return [
            f"{_counted(len(nodes), rule)}: {reason} ({nodes[0]})"
            for (rule, reason), nodes in alike.items()
        ]

    @property
    def summary(self) -> str:
        """`5 norms, 4 rotary embeddings`"""
        return ", ".join(f"{count} {name}s" for name, count in self.counts.items())


def rewrite(program: Program, rules: Sequence[Rewrite[Any]]) -> Rewritten:
    """Apply rules in place, one after the other, each to every candidate in order of the graph.

    A match sees what was rewritten before it. Dead code is rewritten as well: drop it before, and
    what rules have left behind unused after.
    """
    counts, kept = {rule.name: 0 for rule in rules}, []
    for rule in rules:
        for node in list(program.graph.nodes):
            if not rule.is_candidate(node):
                continue
            try:
                operands = rule.match(node)
            except Mismatch as mismatch:
                kept.append(Kept(rule.name, node.name, mismatch.reason))
                continue
            rule.apply(program, node, operands)
            counts[rule.name] += 1
    return Rewritten(counts, tuple(kept))


def described(value: Any) -> str:
    """What an operand is, for a reason: `aten.mul.Tensor`, `an input`, `a parameter`, `2.0`."""
    if not isinstance(value, fx.Node):
        return str(value)
    if value.op == "call_function":
        target = value.target
        name = str(target).removesuffix(".default")
        return name if "." in name else getattr(target, "__name__", name)
    return {"placeholder": "an input", "get_attr": "a parameter"}.get(value.op, value.op)


def _counted(count: int, name: str) -> str:
    return f"{count} {name} stays as it is" if count == 1 else f"{count} {name}s stay as they are"
