"""plan-quantization: every matmul-like weight gets a spec or a stated reason, counted in bytes.

    rule(place of w) + shape of w -> QuantSpec      annotated as `quant` on the matmul
                                   | reason         annotated as `kept`

The rule is that of the part, or of the last of the recipe's `layers` that fits, which is annotated
as `rule` then. One that fits no weight is an error.

The weights of routed experts [E, N, K] are planned as the matrix [E * N, K]: every output of every
expert has groups of its own, along the input features. A router keeps its precision whatever the
recipe says.

Matmuls that read the same activation (q/k/v, gate/up) are fused by runtimes, so they share one
scheme: when the group does not divide the width of one of them, all fall back together to the
largest smaller group that fits, or all keep their precision. In strict mode that is refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx, nn

from gracec.errors import GracecError
from gracec.ir.annotations import (
    Part,
    experts_notes,
    experts_of,
    known_part,
    part_of,
    quant_of,
)
from gracec.ir.places import block_count, places_of
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import EXPERT_LINEAR, MATMULS, STAND_INS, value, weight_of
from gracec.passes.base import Pass, PassResult
from gracec.quant import SUPPORTED_GROUP_SIZES, Experts, QuantSpec, codes_shape
from gracec.quant.observers import ActivationSpec
from gracec.recipe import ActivationRule, Recipe, WeightRule
from gracec.selectors import HOW_TO, fits, part_named

aten = torch.ops.aten
EMBEDDING = aten.embedding.default
ROUTERS = "keep their precision: rounded ones would choose other experts"
QUANTIZABLE = (aten.linear.default, torch.ops.gracec.conv2d.default, EXPERT_LINEAR)


@dataclass(frozen=True)
class PlanEntry:
    """The decision on one weight.

    Attributes:
        fqns: the weight's names in the state dict, more than one when it is tied.
        part: what it is for.
        shape: of the weight, [N, K] = (out, in) for linears, [E * N, K] for experts.
        spec: how it is quantized, or None.
        reason: why it keeps its precision, empty when it is quantized.
        experts: of the weight of routed experts that is quantized, how the model holds it.
        rule: which of the recipe's `layers` decided; empty where its part did.
    """

    fqns: tuple[str, ...]
    part: Part
    shape: tuple[int, ...]
    element_size: int
    spec: QuantSpec | None
    reason: str = ""
    experts: Experts | None = None
    rule: str = ""

    @property
    def fqn(self) -> str:
        return self.fqns[0]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def source_bytes(self) -> int:
        return self.numel * self.element_size

    @property
    def planned_bytes(self) -> int:
        """Bytes after quantization: packed codes and 16-bit scales, or as before."""
        if self.spec is None:
            return self.source_bytes
        rows, columns = self.shape
        scales = self.spec.scale_shape(rows, columns)
        return self.numel * self.spec.storage_bits // 8 + scales[0] * scales[1] * 2


@dataclass(frozen=True)
class Plan:
    """All decisions, by normalised FQN."""

    entries: tuple[PlanEntry, ...] = field(default=())

    @property
    def quantized(self) -> dict[str, QuantSpec]:
        """FQN -> spec of every weight that is quantized."""
        return {entry.fqn: entry.spec for entry in self.entries if entry.spec is not None}

    @property
    def coverage(self) -> float:
        """Share of all matmul-like weight bytes that is quantized."""
        total = sum(entry.source_bytes for entry in self.entries)
        covered = sum(entry.source_bytes for entry in self.entries if entry.spec is not None)
        return covered / total if total else 0.0


def plan_of(program: Program) -> Plan:
    """Read the plan back from a planned program's annotations."""
    entries: dict[str, PlanEntry] = {}
    for node in program.graph.nodes:
        notes = annotation(node)
        if "quant" not in notes and "kept" not in notes:
            continue
        weight = _weight(node)
        assert weight is not None
        tensor = program.tensor(str(weight.target))
        spec, experts = quant_of(node), experts_of(node)
        fqns = program.fqns.get(str(weight.target), (str(weight.target),))
        if tensor.is_floating_point():
            matrix = tensor if experts is None else experts.matrix(tensor.to("meta"))
            shape, element_size = tuple(matrix.shape), tensor.element_size()
        else:  # codes, in the place of a weight in the dtype of the program
            fqns = tuple(fqn.removesuffix(".codes") for fqn in fqns)
            shape, element_size = tuple(codes_shape(tensor)), program.dtype.itemsize
        entry = PlanEntry(
            fqns=fqns,
            part=part_of(node) or (Part.EMBEDDING if node.target == EMBEDDING else Part.OTHER),
            shape=shape,
            element_size=element_size,
            spec=spec,
            reason=notes.get("kept", ""),
            experts=experts,
            rule=notes.get("rule", ""),
        )
        # A table that is looked up and multiplied with is listed once, as what is multiplied.
        if entry.fqn not in entries or entries[entry.fqn].part == Part.EMBEDDING:
            entries[entry.fqn] = entry
    return Plan(tuple(entries.values()))


@dataclass(frozen=True)
class PlanQuantization(Pass):
    """Options: `recipe`, a built-in name or YAML path; `strict` refuses fallbacks."""

    recipe: str | Recipe = "w4a16-ptq"
    strict: bool = False
    name: ClassVar[str] = "plan-quantization"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if not any("part" in annotation(node) for node in program.graph.nodes):
            raise self.refuse(
                "the parts of the model are unknown",
                fix="run analyze-modality first, or analyze-module",
            )
        if any(node.target in STAND_INS for node in program.graph.nodes):
            raise self.refuse("weights are quantized already", fix="plan before insert-fake-quant")

    def apply(self, program: Program) -> PassResult:
        recipe = Recipe.load(self.recipe)
        before = [dict(annotation(node)) for node in program.graph.nodes]
        notes: list[str] = []
        for node in program.graph.nodes:  # a second plan replaces the first
            annotate(node, quant=None, kept=None, act=None, weight_observer=None, rule=None)
            annotate(node, **experts_notes(None))
        sets: dict[int, list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if "part" in annotation(node):
                sets[annotation(node)["fused_set"]].append(node)
            elif _weight(node) is not None:
                annotate(node, quant=None, kept="embedding: looked up, not multiplied")
        self._choose_rules(program, recipe)
        for members in sets.values():
            self._plan_set(program, recipe, members, notes)
        self._keep_the_rest(program)
        if routers := len(list(program.nodes(role="router"))):
            notes.append(f"{routers} routers {ROUTERS}")
        plan = plan_of(program)
        quantized = plan.quantized
        notes += _by_layers(plan, recipe)
        notes.append(
            f"{len(quantized)} of {len(plan.entries)} weights quantized, "
            f"{plan.coverage:.1%} of weight bytes"
        )
        after = [dict(annotation(node)) for node in program.graph.nodes]
        return PassResult(program, before != after, tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        for node in after.graph.nodes:
            if "part" in annotation(node):
                decided = [key for key in ("quant", "kept") if key in annotation(node)]
                if len(decided) != 1:
                    raise self.refuse(f"{node.name} has {len(decided)} decisions, one is needed")
        recipe = Recipe.load(self.recipe)
        only_trains = recipe.training is not None and not recipe.rules()
        if not only_trains and not plan_of(after).quantized:
            raise self.refuse("the recipe quantizes nothing in this model")

    @staticmethod
    def _keep_the_rest(program: Program) -> None:
        """Matrices that no matmul reads: listed as well, so that the bytes add up."""
        decided = {
            _weight(node)
            for node in program.graph.nodes
            if {"quant", "kept"} & annotation(node).keys()
        }
        targets = {weight.target for weight in decided if weight is not None}
        for weight in program.graph.find_nodes(op="get_attr"):
            tensor = program.tensor(str(weight.target))
            matrix = tensor.dim() > 1 and isinstance(tensor, nn.Parameter)
            if matrix and weight.target not in targets and weight.users:
                reader = next(iter(weight.users))
                annotate(reader, kept=f"read by {reader.target}, which is no matmul")

    def _plan_set(
        self, program: Program, recipe: Recipe, members: list[fx.Node], notes: list[str]
    ) -> None:
        candidates: list[fx.Node] = []
        for node in members:
            part, rule = known_part(node), self._rule(recipe, node)
            reason = self._unfit(program, node)
            if part == Part.UNUSED:
                annotate(node, quant=None, kept="unused: the logits do not depend on it")
            elif annotation(node).get("role") == "router":
                annotate(node, quant=None, kept="router: chooses experts, never quantized")
            elif "adapter" in annotation(node):
                annotate(node, quant=None, kept="adapter: kept in float beside its linear")
            elif rule is None:
                by = annotation(node).get("rule")
                what = f"by {by} of recipe {recipe.name}" if by else f"by recipe {recipe.name}"
                annotate(node, quant=None, kept=f"{part}: kept {what}")
            elif reason:
                where = self._fqn(program, node)
                if self.strict:
                    raise self.refuse(reason, where=where, fix="drop strict or change the recipe")
                notes.append(f"{where} kept: {reason}")
                annotate(node, quant=None, kept=reason)
            else:
                candidates.append(node)
        if not candidates:
            return
        rule = self._one_rule(program, recipe, members, candidates)
        widths = {self._width(program, node) for node in candidates}
        spec = self._fit(rule.spec(), widths)
        names = [self._fqn(program, node) for node in candidates]
        if spec != rule.spec():
            wanted, width = rule.group_size, ", ".join(map(str, sorted(widths)))
            chosen = f"group {spec.group_size} instead" if spec else "kept in its precision"
            if self.strict:
                raise self.refuse(
                    f"group {wanted} does not divide the width {width}",
                    where=names[0],
                    fix="choose a group_size that divides it, or drop strict",
                )
            notes.append(f"{', '.join(names)}: group {wanted} does not divide {width}, {chosen}")
        for node in candidates:
            if spec is None:
                annotate(node, quant=None, kept=f"no group divides the width {widths}")
                continue
            observer = None if rule.observer == "mse" else rule.observer
            annotate(node, quant=spec.to_dict(), kept=None, weight_observer=observer)
            annotate(node, **experts_notes(_experts(node)))
            activation = recipe.activation_rule(known_part(node))
            if activation is not None:
                annotate(node, act=self._activation_spec(activation, widths, names[0]).to_dict())

    def _choose_rules(self, program: Program, recipe: Recipe) -> None:
        """Annotate which of the recipe's layers decides, where one does."""
        if not recipe.layers:
            return
        places, blocks, left = places_of(program), block_count(program), dict(recipe.layers)
        for node, place in places.items():
            names = program.fqns.get(str(_weight_target(node)), ())
            for selector in recipe.layers:
                if fits(selector, place, names, blocks):
                    annotate(node, rule=selector)
                    left.pop(selector, None)
        if left:
            selector = next(iter(left))
            example = self._fqn(program, next(iter(places)))
            hint = f"there are {blocks} blocks, and {HOW_TO.removeprefix('say ')} may be said"
            raise self.refuse(
                f"layers: no weight fits {selector!r}",
                where=f"recipe {recipe.name}",
                fix=hint if part_named(selector) else f"names are such as {example}",
            )

    @staticmethod
    def _rule(recipe: Recipe, node: fx.Node) -> WeightRule | None:
        """How the weight of a node is quantized, if the recipe says so."""
        selector = annotation(node).get("rule")
        if selector is not None:
            return recipe.layers[selector]
        return recipe.weight_rule(known_part(node))

    def _one_rule(
        self,
        program: Program,
        recipe: Recipe,
        members: list[fx.Node],
        candidates: list[fx.Node],
    ) -> WeightRule:
        """That of linears that read one activation."""
        rules = {node: self._rule(recipe, node) for node in candidates}
        first = rules[candidates[0]]
        assert first is not None
        fused = [
            node
            for node in members
            if node in rules or (annotation(node).get("rule") and self._rule(recipe, node) is None)
        ]
        other = next((node for node in fused if rules.get(node) != first), None)
        if other is not None:
            raise self.refuse(
                f"it reads the same activation as {self._fqn(program, candidates[0])}, and "
                "runtimes fuse them, but has another rule",
                where=self._fqn(program, other),
                fix="give all of them one rule: decoder.blocks[*].attention, say",
            )
        return first

    def _activation_spec(
        self, rule: ActivationRule, widths: set[int], where: str
    ) -> ActivationSpec:
        spec = ActivationSpec(**rule.model_dump())
        for width in widths:
            try:
                spec.groups(width)
            except GracecError as error:
                raise self.refuse(
                    f"activations: {error.what}", where=where, fix=error.fix
                ) from error
        return spec

    @staticmethod
    def _fit(spec: QuantSpec, widths: set[int]) -> QuantSpec | None:
        if spec.granularity != "per_group":
            return spec
        for group_size in sorted(SUPPORTED_GROUP_SIZES, reverse=True):
            if group_size <= spec.group_size and all(w % group_size == 0 for w in widths):
                return replace(spec, group_size=group_size)
        return None

    @staticmethod
    def _fqn(program: Program, node: fx.Node) -> str:
        return program.fqn(_weight_target(node))

    @staticmethod
    def _width(program: Program, node: fx.Node) -> int:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        tensor = value(weight)
        assert tensor is not None
        return int(tensor.shape[-1])

    @staticmethod
    def _unfit(program: Program, node: fx.Node) -> str:
        """Why this matmul cannot be quantized whatever the recipe says, or an empty string."""
        weight = _weight(node)
        assert weight is not None
        if node.target not in QUANTIZABLE:
            return f"{node.target} is not a linear layer"
        dimensions = program.tensor(str(weight.target)).dim()
        if node.target == EXPERT_LINEAR:
            if _experts(node) is None or dimensions != 3:
                return "the weights of experts are used in another way than one after the other"
            return ""
        if node.args[1] is not weight:
            return "only a view of the weight is used"
        if dimensions != 2:
            return "the weight is not a matrix"
        if any(user.target == EMBEDDING for user in weight.users):
            return "tied to the token embedding"
        return ""


def _by_layers(plan: Plan, recipe: Recipe) -> list[str]:
    """What each of the recipe's layers decided."""
    said = []
    for selector in recipe.layers:
        found = [entry for entry in plan.entries if entry.rule == selector]
        schemes = Counter("kept" if one.spec is None else str(one.spec) for one in found)
        what = ", ".join(f"{count} {scheme}" for scheme, count in schemes.items())
        said.append(f"layers {selector}: {what or 'a later one decides for all that it fits'}")
    return said


def _experts(node: fx.Node) -> Experts | None:
    """How the model holds the weight of a linear of experts, if it is one."""
    if node.target != EXPERT_LINEAR:
        return None
    operand, count = node.args[1], node.args[3]
    assert isinstance(operand, fx.Node) and isinstance(count, int)
    if operand.op == "get_attr":
        return Experts(count)
    turned = operand.target == aten.transpose.int and operand.args[1:] == (1, 2)
    whole = turned and operand.all_input_nodes[0].op == "get_attr"
    return Experts(count, transposed=True) if whole else None


def _weight_target(node: fx.Node) -> str:
    weight = _weight(node)
    assert weight is not None
    return str(weight.target)


def _weight(node: fx.Node) -> fx.Node | None:
    """The parameter of a matmul-like node or of an embedding."""
    if node.target == EMBEDDING:
        table = node.args[0]
        return table if isinstance(table, fx.Node) and table.op == "get_attr" else None
    if node.target not in MATMULS and "kept" in annotation(node):
        return next((n for n in node.all_input_nodes if n.op == "get_attr"), None)
    return weight_of(node)
