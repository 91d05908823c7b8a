"""freeze: turn trained weights and scales into integer codes.

    fake_quantize(w, w_scale)                      -> dequantize(codes, scales)
    scale_codes(codes, w_scale)                    -> dequantize(codes, scales)
    fake_quantize_activation(x, input_scale, z)    -> quantize_dequantize(x, input_scales, z)

with codes = clip(round(w / s)) against the scale on its grid, so that the frozen graph computes
exactly what the fake-quantized one did. The float weights and scale parameters leave the program.
Codes that are there already, whose scales were free to learn (`free-scales`), are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from gracec import quant
from gracec.ir.annotations import experts_of, planned_act, planned_quant
from gracec.ir.program import Program, annotation
from gracec.ir.queries import seen_through
from gracec.passes.base import Pass, PassResult
from gracec.passes.insert_fake_quant import (
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_ACTIVATION,
    FakeQuantized,
    fake_quantized,
    reader,
)
from gracec.passes.rewrite import described
from gracec.quant.frozen import FrozenActivation, FrozenWeight
from gracec.quant.ops import dtype_name

DEQUANTIZE = torch.ops.gracec.dequantize.default
SCALE_CODES = torch.ops.gracec.scale_codes.default
QUANTIZE_DEQUANTIZE = torch.ops.gracec.quantize_dequantize.default


@dataclass(frozen=True)
class Freeze(Pass):
    """No options."""

    name: ClassVar[str] = "freeze"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if not any(any(program.nodes(op)) for op in (FAKE_QUANTIZE, SCALE_CODES, DEQUANTIZE)):
            raise self.refuse("nothing is fake-quantized", fix="run insert-fake-quant first")

    def apply(self, program: Program) -> PassResult:
        count = freeze_weights(program)
        for node in list(program.nodes(SCALE_CODES)):
            _fix_scales(program, node)
            count += 1
        activations = list(program.nodes(FAKE_QUANTIZE_ACTIVATION))
        for node in activations:
            _freeze_activation(program, node)
        drop_dead_tensors(program)
        notes = [f"{count} weights frozen to codes"]
        if activations:
            notes.append(f"{len(activations)} activations frozen to static scales")
        return PassResult(program, bool(count or activations), tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        if any(after.nodes(FAKE_QUANTIZE)) or any(after.nodes(FAKE_QUANTIZE_ACTIVATION)):
            raise self.refuse("a fake_quantize node is left")
        if any(after.nodes(SCALE_CODES)):
            raise self.refuse("a scale_codes node is left")


def freeze_weights(program: Program) -> int:
    """Put codes in the place of every fake-quantized weight, and say how many there were."""
    count = 0
    for fake in fake_quantized(program):
        linear = reader(fake.node)
        codes = quant.quantize(fake.weight, fake.scales, fake.bits, fake.group_size)
        frozen = FrozenWeight.from_codes(
            codes, fake.scales, planned_quant(linear), experts_of(linear)
        )
        replace_fake(program, fake, frozen)
        count += 1
    return count


def with_codes(program: Program, weights: Mapping[str, FrozenWeight]) -> Program:
    """The program with these codes in the place of fake-quantized weights, by FQN."""
    program = program.copy()
    for fake in fake_quantized(program):
        if fake.fqn in weights:
            replace_fake(program, fake, weights[fake.fqn])
    drop_dead_tensors(program)
    program.recompile()
    return program


def learnt_scales(program: Program, node: fx.Node) -> Tensor:
    """The scales float32 [N, K / group_size] that a scale_codes node multiplies its codes with."""
    _, param, signs, _, parametrization, scale_grid, _ = node.args
    assert isinstance(param, fx.Node)
    sign = program.tensor(str(signs.target)) if isinstance(signs, fx.Node) else None
    learnt = program.tensor(str(param.target)).detach()
    return quant.scale_from_param(learnt, str(parametrization), str(scale_grid), sign)


def _fix_scales(program: Program, node: fx.Node) -> None:
    """scale_codes(codes, w_scale, signs) -> dequantize(codes, scales)"""
    codes, param, _, group_size, _, _, dtype = node.args
    assert isinstance(codes, fx.Node) and isinstance(param, fx.Node)
    target = f"{str(codes.target).removesuffix('_codes')}_scales"
    if target not in program.fqns:  # a module that is called twice has one weight
        program.set_tensor(target, learnt_scales(program, node))
        fqn = program.fqn(str(codes.target)).removesuffix(".codes")
        program.fqns[target] = (f"{fqn}.scales",)
    with program.graph.inserting_before(node):
        scales = program.graph.get_attr(target)
        scales.meta = dict(param.meta)
        fixed = program.graph.call_function(DEQUANTIZE, (codes, scales, group_size, dtype))
    fixed.meta = dict(node.meta)
    node.replace_all_uses_with(fixed)
    program.graph.erase_node(node)


def _freeze_activation(program: Program, node: fx.Node) -> None:
    """fake_quantize_activation(x, input_scale, z) -> quantize_dequantize(x, scales, z)"""
    x, scale_param, zero_points, bits, parametrization, scale_grid = node.args
    assert isinstance(scale_param, fx.Node)
    target = str(scale_param.target)
    scales = quant.scale_from_param(
        program.tensor(target).detach(), str(parametrization), str(scale_grid)
    )
    frozen_target = f"{target}s"
    program.set_tensor(frozen_target, scales)
    program.fqns[frozen_target] = (f"{program.fqn(target)}s",)
    with program.graph.inserting_before(node):
        operand = program.graph.get_attr(frozen_target)
        operand.meta = dict(scale_param.meta)
        frozen = program.graph.call_function(QUANTIZE_DEQUANTIZE, (x, operand, zero_points, bits))
    frozen.meta = dict(node.meta)
    node.replace_all_uses_with(frozen)
    program.graph.erase_node(node)


def replace_fake(program: Program, fake: FakeQuantized, frozen: FrozenWeight) -> None:
    """Put `dequantize(codes, scales)` in the place of a fake-quantized weight."""
    operand = fake.node.args[0]
    assert isinstance(operand, fx.Node)
    replace_by_codes(program, fake.node, seen_through(operand), frozen)


def replace_by_codes(
    program: Program, node: fx.Node, weight: fx.Node, frozen: FrozenWeight
) -> fx.Node:
    """Put `dequantize(codes, scales)` in the place of `node`, which stands for `weight`.

    Of experts it is the matrix of all of them; what `node` was computed from is left as it is.
    """
    target = str(weight.target)
    fqn = program.fqn(target)
    operands = []
    with program.graph.inserting_before(node if node is not weight else next(iter(weight.users))):
        for suffix, tensor in (("codes", frozen.stored), ("scales", frozen.scales)):
            path = f"{target}_{suffix}"
            if path not in program.fqns:
                program.set_tensor(path, tensor)
                program.fqns[path] = (f"{fqn}.{suffix}",)
            operand = program.graph.get_attr(path)
            operand.meta = {"val": _fake_like(node, tensor)}
            operands.append(operand)
        dequantized = program.graph.call_function(
            DEQUANTIZE, (*operands, frozen.group_size, dtype_name(program.dtype))
        )
    dequantized.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
    dequantized.meta["val"] = node.meta["val"].new_empty(tuple(frozen.shape))
    for operand in operands:
        operand.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
    for user in list(node.users):
        if user is not dequantized and "quant" in annotation(user):
            user.replace_input_with(node, dequantized)
    while not node.users and node is not weight:  # and the views that it was made of
        dead, node = node, node.all_input_nodes[0]
        program.graph.erase_node(dead)
    if not node.users:
        program.graph.erase_node(node)
    return dequantized


class FrozenNode(NamedTuple):
    """A dequantize node, the target and FQN of the weight that it stands for, and its codes.

    Attributes:
        weight: None if nothing that reads the codes says how they were quantized.
    """

    node: fx.Node
    target: str
    fqn: str
    weight: FrozenWeight | None

    def dense(self, program: Program) -> Tensor:
        """The weight [N, K], [E * N, K] of experts, as the graph computes it."""
        operands: Any = self.node.args
        codes, scales = (program.tensor(str(operand.target)) for operand in operands[:2])
        return quant.dequantize(codes, scales, operands[2], program.dtype)

    def refusal(self, reader: fx.Node, *readers: Any) -> str:
        """Why no kernel stands for `reader`, or "".

        Args:
            readers: operators that kernels stand for, whose second operand is the weight.
        """
        if reader.target not in readers:
            return f"{described(reader)} reads it, for which there is no kernel"
        if [place for place, operand in enumerate(reader.args) if operand is self.node] != [1]:
            return f"{described(reader)} reads it, but not as its weight alone"
        if self.weight is None:
            return "nothing that reads it says how it was quantized"
        return ""


def frozen_nodes(program: Program) -> list[FrozenNode]:
    """Every dequantize node, in the order of the graph."""
    weights, found = frozen_weights(program), []
    for node in program.nodes(DEQUANTIZE):
        codes = node.args[0]
        assert isinstance(codes, fx.Node)
        target = str(codes.target)
        fqn = program.fqn(target).removesuffix(".codes")
        found.append(FrozenNode(node, target.removesuffix("_codes"), fqn, weights.get(fqn)))
    return found


def frozen_activations(program: Program) -> dict[str, FrozenActivation]:
    """FQN of a weight -> the grid of its linear's input, where it has one."""
    found: dict[str, FrozenActivation] = {}
    for linear in program.graph.nodes:
        if not {"act", "quant"} <= annotation(linear).keys() or len(linear.args) < 2:
            continue
        operands: Any = linear.args
        x, weight = operands[:2]
        if x.target != QUANTIZE_DEQUANTIZE or not isinstance(weight, fx.Node):
            continue  # packed experts are several nodes
        held: Any = weight.args[0] if weight.target == DEQUANTIZE else weight
        scales, zero_points = (program.tensor(str(x.args[place].target)) for place in (1, 2))
        fqn = program.fqn(str(held.target)).removesuffix(".codes")
        spec = planned_act(linear)
        found[fqn] = FrozenActivation(scales, zero_points, spec)
    return found


def frozen_weights(program: Program) -> dict[str, FrozenWeight]:
    """FQN -> codes and scales of every frozen weight of a program."""
    found: dict[str, FrozenWeight] = {}
    activations = frozen_activations(program)
    for linear in program.graph.nodes:
        if "quant" not in annotation(linear) or len(linear.args) < 2:
            continue
        node = linear.args[1]
        if isinstance(node, fx.Node) and node.target == DEQUANTIZE:
            codes, scales = (str(arg.target) for arg in node.args[:2] if isinstance(arg, fx.Node))
            fqn = program.fqn(codes).removesuffix(".codes")
            found[fqn] = FrozenWeight(
                program.tensor(codes),
                program.tensor(scales),
                planned_quant(linear),
                activations.get(fqn),
                experts_of(linear),
            )
    return found


def drop_dead_tensors(program: Program) -> None:
    """Erase get_attr nodes without users and let go of tensors that no node reads any more."""
    for node in reversed(program.graph.nodes):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    alive = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    for target in [target for target in program.fqns if target not in alive]:
        program.delete_tensor(target)
        del program.fqns[target]


def _fake_like(node: fx.Node, tensor: Tensor) -> Tensor:
    """A fake tensor of this shape and dtype, in the fake mode that traced `node`."""
    traced: Tensor = node.meta["val"]
    return traced.new_empty(tuple(tensor.shape), dtype=tensor.dtype)
