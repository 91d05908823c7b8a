"""lower-qdq: run frozen weights with ONNX Runtime's INT4 and int8 kernels.

    linear(x, dequantize(codes [N, K], scales), b)
    ->  matmul(x, dequantize_linear(codes [K, N], scales, block)) + b     ops=qdq
    ->  matmul_nbits(x, codes, scales, bits, block, level) + b            ops=matmulnbits

    linear(quantize_dequantize(x), dequantize(codes, scales), b)
    ->  matmul(x', dequantize_linear(codes [K, N], scales [N])) + b       one scale an output, wide
    ->  matmul(x', ...) as above                                          otherwise
        with x' = dequantize_activation(quantize_activation(x, s, z), s, z)

The first is standard ONNX, which the runtime fuses into the operator of the second. It fuses
nothing that two nodes share, so each linear gets codes and scales of its own. A weight that the
kernel does not take becomes a dense weight with the same values; it is named in the notes, and in
strict mode that is an error.

The runtime fuses nothing either where both operands of a MatMul are dequantized and one is 4-bit,
so there the scale of the input is multiplied in a step of its own, which gives the same values:

    x' = dequantize_activation(quantize_activation(x, s, z), 1, z) * s

What else reads a weight reads it dense, with its reason in the notes, and so does a convolution
whose scales are neither of filters nor of blocks.

Each routed expert has a kernel of its own, which gets the rows that are for it:

    expert_linear(x, dequantize(codes [E * N, K], scales), experts)
    ->  expert_matmul(x, experts, [dequantize_linear(...), ...])          ops=qdq
    ->  expert_matmul_nbits(x, experts, [codes, ...], [scales, ...], ...) ops=matmulnbits

No kernel takes a convolution with codes: its weight is dequantized, turned and seen as filters, and
the convolution runs in float32.

    conv2d(x, dequantize(codes [O, K], scales), ...)
    ->  conv2d(x, view(transpose(dequantize_linear(codes [K, O], scales, block))), ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from gracec._memory import trim
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import EXPERT_LINEAR
from gracec.kernels import onnxruntime as kernel
from gracec.passes.base import Pass, PassResult
from gracec.passes.flatten_convolutions import FLAT_CONVOLUTION
from gracec.passes.freeze import (
    DEQUANTIZE,
    QUANTIZE_DEQUANTIZE,
    FrozenNode,
    drop_dead_tensors,
    frozen_nodes,
)
from gracec.quant.frozen import FrozenWeight

LINEAR = torch.ops.aten.linear.default
DEQUANTIZE_LINEAR = torch.ops.gracec.dequantize_linear.default
MATMUL_NBITS = torch.ops.gracec.matmul_nbits.default
EXPERT_MATMUL = torch.ops.gracec.expert_matmul.default
EXPERT_MATMUL_NBITS = torch.ops.gracec.expert_matmul_nbits.default
READ_CODES = (DEQUANTIZE_LINEAR, MATMUL_NBITS, EXPERT_MATMUL_NBITS)


@dataclass(frozen=True)
class LowerQdq(Pass):
    """Options: `ops` (qdq or matmulnbits), `mode` (faithful or fast: the accuracy level that
    MatMulNBits carries; for qdq it is an option of the session), `strict` refuses weights that the
    kernel does not take."""

    ops: str = "qdq"
    mode: str = "faithful"
    strict: bool = False
    name: ClassVar[str] = "lower-qdq"
    keeps_numerics: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        kernel.check_options(self.ops, self.mode)
        lowered = any("kernel" in annotation(node) for node in program.graph.nodes)
        if not any(program.nodes(DEQUANTIZE)) and not lowered:
            raise self.refuse("no weight is frozen to codes", fix="run freeze first")
        if program.dtype != torch.float32:
            raise self.refuse(f"the graph computes in {program.dtype}", fix="capture in float32")

    def apply(self, program: Program) -> PassResult:
        notes = []
        nodes = frozen_nodes(program)
        rounded: dict[tuple[fx.Node, bool], fx.Node] = {}
        for found in nodes:
            node, target, fqn, frozen = found
            reasons: dict[str, None] = {}
            for number, reader in enumerate(list(node.users)):
                suffix = f"_{number}" if number else ""
                reason = _refusal(found, reader)
                if reason and self.strict:
                    raise self.refuse(reason, where=fqn, fix="change the recipe or drop strict")
                if reason or frozen is None:
                    reasons[reason] = None
                    _make_dense(program, reader, found, suffix)
                elif reader.target == FLAT_CONVOLUTION:
                    self._lower_convolution(program, reader, target + suffix, fqn + suffix, frozen)
                else:
                    x = reader.args[0]
                    if isinstance(x, fx.Node) and x.target == QUANTIZE_DEQUANTIZE:
                        fused = kernel.runs_int8(frozen) or self.ops == "matmulnbits"
                        if (x, fused) not in rounded:
                            rounded[x, fused] = self._lower_input(program, x, fqn, frozen, fused)
                        reader.update_arg(0, rounded[x, fused])
                    lower = self._lower_experts if frozen.experts else self._lower
                    lower(program, reader, target + suffix, fqn + suffix, frozen)
            notes += [f"{fqn} runs dense: {reason}" for reason in reasons]
            program.graph.erase_node(node)
            drop_dead_tensors(program)
            trim()
        for x in {x for x, _ in rounded}:
            if not x.users:
                program.graph.erase_node(x)
        drop_dead_tensors(program)
        lowered = lowered_weights(program).values()
        for name, kind in (("INT4", kernel.MATMUL_NBITS), ("INT8", kernel.MATMUL_INT8)):
            count = sum(weight.kernel == kind for weight in lowered)
            if count or kind == kernel.MATMUL_NBITS:
                notes.append(f"{count} weights run on {name} kernels")
        return PassResult(program, bool(nodes), tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        if any(after.nodes(DEQUANTIZE)):
            raise self.refuse("a dequantize node is left")
        for node in after.graph.find_nodes(op="get_attr"):
            lowered = [n for n in node.users if n.target in READ_CODES]
            if lowered and len(node.users) > 1:
                raise self.refuse("two nodes share codes or scales", where=str(node.target))

    def _lower(
        self, program: Program, linear: fx.Node, target: str, fqn: str, frozen: FrozenWeight
    ) -> None:
        """linear(x, w, b) -> matmul(x, w') + b"""
        x, _, *bias = linear.args
        assert isinstance(x, fx.Node)
        block, bits = kernel.block_size(frozen), kernel.kernel_bits(frozen, self.ops)
        int8 = kernel.runs_int8(frozen)
        with program.graph.inserting_before(linear):
            if self.ops == "qdq" or int8:
                operands = (kernel.int8_operands if int8 else kernel.qdq_operands)(frozen)
                block = 0 if int8 else block
                codes, scales = _constants(program, linear, target, fqn, _named(operands))
                weight = program.graph.call_function(DEQUANTIZE_LINEAR, (codes, scales, block))
                weight.meta = {"val": linear.meta["val"].new_empty(frozen.shape[::-1])}
                product = program.graph.call_function(torch.ops.aten.matmul.default, (x, weight))
                lowered, inner = product, weight
            else:
                operands = kernel.matmulnbits_operands(frozen)
                codes, scales = _constants(program, linear, target, fqn, _named(operands))
                level = kernel.ACCURACY_LEVEL[self.mode]
                arguments = (x, codes, scales, bits, block, level)
                lowered = program.graph.call_function(MATMUL_NBITS, arguments)
                product = inner = lowered
            product.meta = dict(linear.meta)
            if bias and bias[0] is not None:
                lowered = program.graph.call_function(torch.ops.aten.add.Tensor, (product, bias[0]))
                lowered.meta = {k: linear.meta[k] for k in STACK if k in linear.meta}
        inner.meta |= {k: linear.meta[k] for k in STACK[1:] if k in linear.meta}
        annotate(product, kernel="int4" if bits <= 4 else "int8")
        linear.replace_all_uses_with(lowered)
        program.graph.erase_node(linear)

    def _lower_experts(
        self, program: Program, linear: fx.Node, target: str, fqn: str, frozen: FrozenWeight
    ) -> None:
        """expert_linear(x, w, experts) -> expert_matmul(x, experts, [w', ...])"""
        x, experts = linear.args[0], linear.args[2]
        block, bits = kernel.block_size(frozen), kernel.kernel_bits(frozen, self.ops)
        qdq = self.ops == "qdq"
        constants = []
        with program.graph.inserting_before(linear):
            for number, one in enumerate(frozen.matrices()):
                operands = (kernel.qdq_operands if qdq else kernel.matmulnbits_operands)(one)
                names = f"{target}_{number}", f"{fqn}.{number}"
                found = _constants(program, linear, *names, _named(operands))
                if qdq:
                    weight = program.graph.call_function(DEQUANTIZE_LINEAR, (*found, block))
                    weight.meta = {"val": linear.meta["val"].new_empty(one.shape[::-1])}
                    weight.meta |= {k: linear.meta[k] for k in STACK[1:] if k in linear.meta}
                    found = [weight]
                constants.append(found)
            lists = [list(kind) for kind in zip(*constants, strict=True)]
            arguments: tuple[Any, ...] = (x, experts, *lists)
            if not qdq:
                arguments += (bits, block, kernel.ACCURACY_LEVEL[self.mode])
            lowered = program.graph.call_function(
                EXPERT_MATMUL if qdq else EXPERT_MATMUL_NBITS, arguments
            )
        lowered.meta = dict(linear.meta)
        annotate(lowered, kernel="int4" if bits <= 4 else "int8")
        linear.replace_all_uses_with(lowered)
        program.graph.erase_node(linear)

    @staticmethod
    def _lower_convolution(
        program: Program, flat: fx.Node, target: str, fqn: str, frozen: FrozenWeight
    ) -> None:
        """gracec::conv2d(x, matrix, ...) -> conv2d(x, view(transpose(w')), ...)"""
        x, _, bias, kernel_size, *options = flat.args
        traced: Tensor = flat.meta["val"]
        rows, columns = frozen.shape
        shape = [rows, -1, *kernel_size]  # type: ignore[misc]
        call = program.graph.call_function
        with program.graph.inserting_before(flat):
            block = kernel.block_size(frozen)
            operands = kernel.qdq_operands(frozen) if block else kernel.filter_operands(frozen)
            codes, scales = _constants(program, flat, target, fqn, _named(operands))
            weight = call(DEQUANTIZE_LINEAR, (codes, scales, block))
            turned = call(torch.ops.aten.t.default, (weight,))
            filters = call(torch.ops.aten.view.default, (turned, shape))
            lowered = call(torch.ops.aten.conv2d.default, (x, filters, bias, *options))
        weight.meta["val"] = traced.new_empty(columns, rows)
        turned.meta["val"] = traced.new_empty(rows, columns)
        filters.meta["val"] = turned.meta["val"].view(shape)
        for node in (weight, turned, filters, lowered):
            node.meta |= {k: flat.meta[k] for k in STACK[1:] if k in flat.meta}
        lowered.meta["val"] = traced
        annotate(lowered, kernel="dequantized")
        flat.replace_all_uses_with(lowered)
        program.graph.erase_node(flat)

    @staticmethod
    def _lower_input(
        program: Program, rounded: fx.Node, fqn: str, frozen: FrozenWeight, fused: bool
    ) -> fx.Node:
        """quantize_dequantize(x, scales, zero_points) -> x', for all linears that read it."""
        assert frozen.activation is not None and isinstance(rounded.args[1], fx.Node)
        target, x = str(rounded.args[1].target), rounded.args[0]
        traced: Tensor = rounded.meta["val"]
        call = program.graph.call_function
        with program.graph.inserting_before(rounded):
            operands = kernel.activation_operands(frozen.activation)
            names = ("input_scale", "input_zero_point")
            scale, zero_point = _constants(
                program, rounded, target, fqn, dict(zip(names, operands, strict=True))
            )
            codes = call(torch.ops.gracec.quantize_activation.default, (x, scale, zero_point))
            by = scale
            if not fused:
                (by,) = _constants(program, rounded, target, fqn, {"input_one": torch.tensor(1.0)})
            values = call(torch.ops.gracec.dequantize_activation.default, (codes, by, zero_point))
            found = values if fused else call(torch.ops.aten.mul.Tensor, (values, scale))
        for node in {codes, values, found}:
            node.meta = {k: rounded.meta[k] for k in STACK if k in rounded.meta}
        codes.meta["val"] = traced.new_empty(traced.shape, dtype=torch.uint8)
        annotate(found, act=frozen.activation.spec.to_dict())
        return found


STACK = ("val", "nn_module_stack")


def _refusal(found: FrozenNode, reader: fx.Node) -> str:
    """Why what reads a weight has to read it dense, or ""."""
    reason = found.refusal(reader, LINEAR, FLAT_CONVOLUTION, EXPERT_LINEAR)
    if reason or found.weight is None:
        return reason
    if reader.target == FLAT_CONVOLUTION:
        return kernel.filter_refusal(found.weight)
    return kernel.refusal(found.weight)


def _make_dense(program: Program, reader: fx.Node, found: FrozenNode, suffix: str) -> None:
    """Let a node read the values that the codes stand for; a convolution reads them as filters."""
    target, fqn, dequantized = found.target + suffix, found.fqn + suffix, found.node
    weight, traced = found.dense(program), dequantized.meta["val"]
    if reader.target == FLAT_CONVOLUTION and reader.args[1] is dequantized:
        x, _, bias, kernel_size, *options = reader.args
        shape = [len(weight), -1, *kernel_size]  # type: ignore[misc]
        weight, traced = weight.view(shape), traced.view(shape)
        reader.target = torch.ops.aten.conv2d.default
        reader.args = (x, dequantized, bias, *options)
    program.set_tensor(target, nn.Parameter(weight, requires_grad=False))
    program.fqns[target] = (fqn,)
    with program.graph.inserting_before(reader):
        dense = program.graph.get_attr(target)
    dense.meta = dequantized.meta | {"val": traced}
    reader.replace_input_with(dequantized, dense)
    annotate(reader, kernel="dense")


def _named(operands: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("codes", "scales"), operands, strict=True))


def _constants(
    program: Program, linear: fx.Node, target: str, fqn: str, operands: Mapping[str, Tensor]
) -> list[fx.Node]:
    """Operands in the layout of the kernel, as tensors of this linear alone."""
    nodes = []
    for suffix, tensor in operands.items():
        path = f"{target}_kernel_{suffix}"
        program.set_tensor(path, tensor)
        program.fqns[path] = (f"{fqn}.{suffix}",)
        node = program.graph.get_attr(path)
        traced: Tensor = linear.meta["val"]
        node.meta = {"val": traced.new_empty(tuple(tensor.shape), dtype=tensor.dtype)}
        node.meta |= {k: linear.meta[k] for k in STACK[1:] if k in linear.meta}
        nodes.append(node)
    return nodes


@dataclass(frozen=True)
class LoweredWeight:
    """A weight [N, K] that runs on a kernel.

    Attributes:
        codes, scales: in the layout of the kernel.
        bits: that a code takes in it.
        block_size: input features that share a scale in it; 0 for the int8 kernel, which has one
            for each output.
        rows, columns: N and K.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    block_size: int
    rows: int
    columns: int

    @property
    def kernel(self) -> str:
        """The operator that the runtime makes of it."""
        return kernel.MATMUL_NBITS if self.block_size else kernel.MATMUL_INT8


def lowered_weights(program: Program) -> dict[str, LoweredWeight]:
    """FQN -> weight of every matmul that runs on a kernel."""
    found: dict[str, LoweredWeight] = {}
    for node in program.graph.nodes:
        if node.target == DEQUANTIZE_LINEAR:
            kinds = (torch.ops.aten.matmul.default, EXPERT_MATMUL)
            if any(user.target not in kinds for user in node.users):
                continue  # of a convolution
            codes, scales, block = node.args
            columns, rows = node.meta["val"].shape
            bits = 4 if program.tensor(str(codes.target)).dtype == torch.uint8 else 8
        elif node.target == MATMUL_NBITS:
            _, codes, scales, bits, block, _ = node.args
            rows, blocks = program.tensor(str(scales.target)).shape
            columns = blocks * block
        elif node.target == EXPERT_MATMUL_NBITS:
            _, _, every_codes, every_scales, bits, block, _ = node.args
            for own in zip(every_codes, every_scales, strict=True):
                rows, blocks = program.tensor(str(own[1].target)).shape
                found |= _lowered(program, *own, bits, block, rows, blocks * block)
            continue
        else:
            continue
        found |= _lowered(program, codes, scales, bits, block, rows, columns)
    return found


def _lowered(
    program: Program,
    codes: fx.Node,
    scales: fx.Node,
    *layout: int,
) -> dict[str, LoweredWeight]:
    """FQN of a weight -> the weight.

    Args:
        layout: bits, block size, rows and columns.
    """
    tensors = [program.tensor(str(node.target)) for node in (codes, scales)]
    fqn = program.fqn(str(codes.target)).removesuffix(".codes")
    return {fqn: LoweredWeight(tensors[0], tensors[1], *layout)}
