"""insert-fake-quant: simulate the planned quantization inside the graph.

    linear(x, w)           -> linear(x, fake_quantize(w, w_scale))
    linear(x, w)           -> linear(x, fake_quantize(w, w_scale, w_scale_sign))     signed scales
    linear(observer(x), w) -> linear(fake_quantize_activation(x, input_scale, zero_point), ...)
    expert_linear(x, w)    -> expert_linear(x, fake_quantize(reshape(w), w_scale))

A weight that lies on such a grid already, as those of quantization-aware training do that are given
as floats, gets the scales of its grid: its codes are taken as they are (annotation `lattice`).

The scale parameter belongs to the module that owns the weight (`...q_proj.weight_scale`) and starts
at the scale of least squared error, weighed by second moments of the inputs where
`observe-second-moments` has watched them; where scales are signed, their signs lie beside it in a
buffer that is not trained (`...q_proj.weight_scale_sign`). The node stands right before its linear,
because nodes of one module must stay contiguous for `torch.export.unflatten`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from gracec import quant
from gracec.errors import GracecError
from gracec.ir.annotations import experts_of, planned_quant
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import seen_through, value, weight_of
from gracec.passes.base import Pass, PassResult
from gracec.passes.insert_observers import PREFIX, observer_nodes
from gracec.passes.observe_second_moments import PREFIX as MOMENTS
from gracec.passes.observe_second_moments import moment_observers
from gracec.quant.lattice import Lattice, find_lattice, other_grid
from gracec.quant.observers import Observer, weight_scales
from gracec.quant.ops import dtype_name
from gracec.quant.second_moments import importance as importance_of

FAKE_QUANTIZE = torch.ops.gracec.fake_quantize.default
FAKE_QUANTIZE_ACTIVATION = torch.ops.gracec.fake_quantize_activation.default


class FakeQuantized(NamedTuple):
    """A fake-quantized weight of a program, as it is now.

    Attributes:
        node: the fake_quantize node.
        fqn, scale_fqn: of the weight and of its scale parameter.
        weight: [N, K], the float master.
        scales: [N, K / group_size], on the grid that the node rounds them to.
        group_size: input features that share one scale.
    """

    node: fx.Node
    fqn: str
    scale_fqn: str
    weight: Tensor
    scales: Tensor
    bits: int
    group_size: int


def fake_quantized(program: Program) -> Iterator[FakeQuantized]:
    """Every fake-quantized weight, in the order of the graph."""
    for node in list(program.nodes(FAKE_QUANTIZE)):
        operand, scale, bits, group_size, parametrization, scale_grid, _, *rest = node.args
        assert isinstance(operand, fx.Node) and isinstance(scale, fx.Node)
        weight, experts = seen_through(operand), experts_of(reader(node))
        assert isinstance(bits, int) and isinstance(group_size, int)
        names = program.fqn(str(weight.target)), program.fqn(str(scale.target))
        tensors = (program.tensor(str(one.target)).detach() for one in (weight, scale))
        master, param = tensors
        master = master if experts is None else experts.matrix(master)
        (sign,) = rest or [None]
        signs = program.tensor(str(sign.target)) if isinstance(sign, fx.Node) else None
        scales = quant.scale_from_param(param, str(parametrization), str(scale_grid), signs)
        yield FakeQuantized(node, *names, master, scales, bits, group_size)


def signs_of_scales(program: Program) -> dict[str, Tensor]:
    """FQN -> signs of the scales of every weight whose scales are signed; they are not trained."""
    signs = [node.args[7] for node in program.nodes(FAKE_QUANTIZE) if len(node.args) > 7]
    targets = [str(sign.target) for sign in signs if isinstance(sign, fx.Node)]
    return {program.fqn(target): program.tensor(target) for target in targets}


def reader(node: fx.Node) -> fx.Node:
    """The planned matmul whose weight a node is."""
    return next(user for user in node.users if "quant" in annotation(user))


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Options: the grid of the scale search, in multiples of max|w| / q_max."""

    candidates: int = 64
    lowest: float = 0.3
    highest: float = 1.2
    name: ClassVar[str] = "insert-fake-quant"
    keeps_numerics: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        decided = {"quant", "kept"}
        if not any(decided & annotation(node).keys() for node in program.graph.nodes):
            raise self.refuse("no weight has a plan", fix="run plan-quantization first")

    def apply(self, program: Program) -> PassResult:
        inserted = 0
        importances = _importances(program)
        lattices: dict[str, _OnGrid] = {}
        for node in list(_planned(program)):
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if weight.target == FAKE_QUANTIZE:
                continue
            self._insert(program, node, weight, importances.get(node), lattices)
            inserted += 1
        notes = [f"{inserted} weights fake-quantized", *_told_of_grids(lattices)]
        observers = list(observer_nodes(program))
        for node in observers:
            self._insert_activation(program, node)
        if observers:
            program.graph_module.delete_submodule(PREFIX)
            notes.append(f"{len(observers)} activations fake-quantized")
        return PassResult(program, inserted > 0 or bool(observers), tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        for node in _planned(after):
            activation = node.args[0]
            assert isinstance(activation, fx.Node)
            if "act" in annotation(node) and "act" not in annotation(activation):
                raise self.refuse(
                    f"the input of {node.name} is planned but was not observed",
                    fix="run insert-observers first",
                )
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or weight.target != FAKE_QUANTIZE:
                raise self.refuse(f"{node.name} is planned but not fake-quantized")

    def _insert(
        self,
        program: Program,
        linear: fx.Node,
        weight: fx.Node,
        importance: Tensor | None,
        lattices: dict[str, _OnGrid],
    ) -> None:
        spec, experts = planned_quant(linear), experts_of(linear)
        target = str(seen_through(weight).target)
        matrix = program.tensor(target)
        matrix = matrix if experts is None else experts.matrix(matrix)
        fqn = program.fqn(target)
        scale_target = f"{target}_scale"
        if scale_target not in program.fqns:  # a module that is called twice has one scale
            lattice = find_lattice(matrix, spec)
            lattices[fqn] = _OnGrid(spec, lattice, "" if lattice else other_grid(matrix, spec))
            try:
                scales = lattice.scales if lattice else self._scales(matrix, linear, importance)
            except GracecError as error:
                raise self.refuse(error.what, where=fqn, fix=error.fix) from error
            param = nn.Parameter(quant.scale_to_param(scales, spec.parametrization))
            program.set_tensor(scale_target, param)
            program.fqns[scale_target] = (f"{fqn}_scale",)
            if spec.signed:
                program.set_tensor(f"{scale_target}_sign", quant.scale_signs(scales))
                program.fqns[f"{scale_target}_sign"] = (f"{fqn}_scale_sign",)
        if lattices.get(fqn, _OnGrid(spec)).lattice is not None:
            annotate(linear, lattice=True)
        rows, columns = matrix.shape
        weight_value = value(weight)
        assert weight_value is not None
        stack = dict(linear.meta.get("nn_module_stack") or {})
        with program.graph.inserting_before(linear):
            if experts is not None:
                weight_value = weight_value.reshape(rows, columns)
                weight = program.graph.call_function(
                    torch.ops.aten.reshape.default, (weight, [rows, columns])
                )
                weight.meta = {"val": weight_value, "nn_module_stack": stack}
            scale = program.graph.get_attr(scale_target)
            signs = [program.graph.get_attr(f"{scale_target}_sign")] if spec.signed else []
            fake = program.graph.call_function(
                FAKE_QUANTIZE,
                (
                    weight,
                    scale,
                    spec.bits,
                    spec.group_of(columns),
                    spec.parametrization,
                    spec.scale_grid,
                    dtype_name(program.dtype),
                    *signs,
                ),
            )
        shape = spec.scale_shape(rows, columns)
        scale.meta = {"val": weight_value.new_empty(shape, dtype=torch.float32)}
        for sign in signs:
            sign.meta = {"val": weight_value.new_empty(shape, dtype=torch.int8)}
        fake.meta = {"val": torch.empty_like(weight_value)}
        for node in (scale, *signs, fake):
            node.meta["nn_module_stack"] = stack
        linear.update_arg(1, fake)

    def _scales(self, matrix: Tensor, linear: fx.Node, importance: Tensor | None) -> Tensor:
        """Scales of a weight [P * N, K] of which each of P matrices has an importance [P, K]."""
        spec = planned_quant(linear)
        each: list[Tensor | None] = [None]
        if importance is not None:
            whole = spec.granularity == "per_tensor"
            each = [importance.mean(0)] if whole else list(importance)
        found = [
            weight_scales(
                part,
                spec,
                annotation(linear).get("weight_observer", "mse"),
                candidates=self.candidates,
                lowest=self.lowest,
                highest=self.highest,
                importance=counts,
            )
            for part, counts in zip(matrix.chunk(len(each)), each, strict=True)
        ]
        return torch.cat(found)

    def _insert_activation(self, program: Program, node: fx.Node) -> None:
        """observer(x) -> fake_quantize_activation(x, input_scale, input_zero_point)"""
        observer = program.graph_module.get_submodule(str(node.target))
        assert isinstance(observer, Observer)
        scales, zero_points = observer.scales_and_zero_points()
        consumer = next(iter(node.users))
        weight = weight_of(consumer)
        assert weight is not None
        tensors = {
            "input_scale": nn.Parameter(quant.scale_to_param(scales, "log")),
            "input_zero_point": zero_points,
        }
        traced = value(node)
        assert traced is not None
        with program.graph.inserting_before(node):
            operands = []
            for name, tensor in tensors.items():
                own, fqn = str(weight.target), program.fqn(str(weight.target))
                if experts_of(consumer) is None:
                    target, named = (f"{one.rpartition('.')[0]}.{name}" for one in (own, fqn))
                else:  # several weights in one module, each with an input of its own
                    target, named = f"{own}_{name}", f"{fqn}_{name}"
                program.set_tensor(target, tensor)
                program.fqns[target] = (named,)
                operand = program.graph.get_attr(target)
                operand.meta = {"val": traced.new_empty(tensor.shape, dtype=tensor.dtype)}
                operands.append(operand)
            fake = program.graph.call_function(
                FAKE_QUANTIZE_ACTIVATION,
                (node.args[0], *operands, observer.spec.bits, "log", "bf16"),
            )
        fake.meta = dict(node.meta)
        annotate(fake, observer=None, act=observer.spec.to_dict())
        node.replace_all_uses_with(fake)
        program.graph.erase_node(node)


class _OnGrid(NamedTuple):
    """The grid that a weight lies on, or one that its spec cannot hold."""

    spec: quant.QuantSpec
    lattice: Lattice | None = None
    other: str = ""


def _told_of_grids(found: Mapping[str, _OnGrid]) -> list[str]:
    notes = []
    taken = Counter(str(one.spec) for one in found.values() if one.lattice is not None)
    for spec, count in sorted(taken.items()):
        notes.append(f"{count} weights lie on a grid of {spec}: their codes are taken as they are")
    changed = [
        (one.lattice.changed, fqn)
        for fqn, one in found.items()
        if one.lattice is not None and one.lattice.changed > 0
    ]
    if changed:
        share, fqn = max(changed)
        notes.append(
            f"scales of {len(changed)} of these were rounded to the grid of scales, which changes "
            f"up to {share:.1%} of the values of a weight ({fqn})"
        )
    others = Counter((one.other, str(one.spec)) for one in found.values() if one.other)
    for (other, spec), count in sorted(others.items()):
        notes.append(
            f"{count} weights lie on a grid of {other}, which {spec} does not hold: quantized anew"
        )
    return notes


def _importances(program: Program) -> dict[fx.Node, Tensor]:
    """Planned matmul -> what each input feature counts to each of its matrices, [P, K].

    The observers that know are taken out.
    """
    found: dict[fx.Node, Tensor] = {}
    observers = list(moment_observers(program))
    for node, observer in observers:
        for user in node.users:
            if observer.moments.seen:
                found[user] = importance_of(observer.moments.means())
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)
    if observers:
        program.graph_module.delete_submodule(MOMENTS)
    return found


def _planned(program: Program) -> Iterator[fx.Node]:
    return (node for node in program.graph.nodes if "quant" in annotation(node))
