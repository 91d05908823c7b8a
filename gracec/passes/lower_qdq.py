"""lower-qdq: run frozen weights with ONNX Runtime's INT4 kernel.

    linear(x, dequantize(codes [N, K], scales), b)
    ->  matmul(x, dequantize_linear(codes [K, N], scales, block)) + b     ops=qdq
    ->  matmul_nbits(x, codes, scales, bits, block, level) + b            ops=matmulnbits

The first is standard ONNX, which the runtime fuses into the operator of the second. It fuses
nothing that two nodes share, so each linear gets codes and scales of its own. A weight that the
kernel does not take becomes a dense weight with the same values; it is named in the notes, and in
strict mode that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from gracec._memory import trim
from gracec.backends.onnx import kernel
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import DEQUANTIZE, FrozenWeight, drop_dead_tensors, frozen_nodes
from gracec.program import Program, annotate

DEQUANTIZE_LINEAR = torch.ops.gracec.dequantize_linear.default
MATMUL_NBITS = torch.ops.gracec.matmul_nbits.default


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
        if not any(program.nodes(DEQUANTIZE)) and not lowered_weights(program):
            raise self.refuse("no weight is frozen to codes", fix="run freeze first")
        if program.dtype != torch.float32:
            raise self.refuse(f"the graph computes in {program.dtype}", fix="capture in float32")

    def apply(self, program: Program) -> PassResult:
        notes = []
        nodes = frozen_nodes(program)
        for node, target, fqn, frozen in nodes:
            reason = kernel.refusal(frozen)
            if reason and self.strict:
                raise self.refuse(reason, where=fqn, fix="change the recipe or drop strict")
            for number, linear in enumerate(list(node.users)):
                suffix = f"_{number}" if number else ""
                if reason:
                    self._make_dense(program, linear, node, target + suffix, fqn + suffix, frozen)
                else:
                    self._lower(program, linear, target + suffix, fqn + suffix, frozen)
            if reason:
                notes.append(f"{fqn} runs dense: {reason}")
            program.graph.erase_node(node)
            drop_dead_tensors(program)
            trim()
        notes.append(f"{len(lowered_weights(program))} weights run on INT4 kernels")
        return PassResult(program, bool(nodes), tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        if any(after.nodes(DEQUANTIZE)):
            raise self.refuse("a dequantize node is left")
        for node in after.graph.find_nodes(op="get_attr"):
            lowered = [n for n in node.users if n.target in (DEQUANTIZE_LINEAR, MATMUL_NBITS)]
            if lowered and len(node.users) > 1:
                raise self.refuse("two nodes share codes or scales", where=str(node.target))

    def _lower(
        self, program: Program, linear: fx.Node, target: str, fqn: str, frozen: FrozenWeight
    ) -> None:
        """linear(x, w, b) -> matmul(x, w') + b"""
        x, _, *bias = linear.args
        assert isinstance(x, fx.Node)
        block, bits = kernel.block_size(frozen), kernel.kernel_bits(frozen, self.ops)
        with program.graph.inserting_before(linear):
            if self.ops == "qdq":
                operands = kernel.qdq_operands(frozen)
                codes, scales = _constants(program, linear, target, fqn, operands)
                weight = program.graph.call_function(DEQUANTIZE_LINEAR, (codes, scales, block))
                weight.meta = {"val": linear.meta["val"].new_empty(frozen.shape[::-1])}
                product = program.graph.call_function(torch.ops.aten.matmul.default, (x, weight))
                lowered, inner = product, weight
            else:
                operands = kernel.matmulnbits_operands(frozen)
                codes, scales = _constants(program, linear, target, fqn, operands)
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

    @staticmethod
    def _make_dense(
        program: Program,
        linear: fx.Node,
        dequantized: fx.Node,
        target: str,
        fqn: str,
        frozen: FrozenWeight,
    ) -> None:
        program.set_tensor(target, nn.Parameter(frozen.dequantize(), requires_grad=False))
        program.fqns[target] = (fqn,)
        with program.graph.inserting_before(linear):
            weight = program.graph.get_attr(target)
        weight.meta = dict(dequantized.meta)
        linear.replace_input_with(dequantized, weight)
        annotate(linear, kernel="dense")


STACK = ("val", "nn_module_stack")


def _constants(
    program: Program, linear: fx.Node, target: str, fqn: str, operands: tuple[Tensor, Tensor]
) -> list[fx.Node]:
    """Codes and scales in the layout of the kernel, as tensors of this linear alone."""
    nodes = []
    for suffix, tensor in zip(("codes", "scales"), operands, strict=True):
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
    """A weight [N, K] that runs on the kernel.

    Attributes:
        codes, scales: in the layout of the kernel.
        bits: that a code takes in it.
        rows, columns: N and K.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    block_size: int
    rows: int
    columns: int


def lowered_weights(program: Program) -> dict[str, LoweredWeight]:
    """FQN -> weight of every matmul that runs on the INT4 kernel."""
    found: dict[str, LoweredWeight] = {}
    for node in program.graph.nodes:
        if node.target == DEQUANTIZE_LINEAR:
            codes, scales, block = node.args
            columns, rows = node.meta["val"].shape
            bits = 4 if program.tensor(str(codes.target)).dtype == torch.uint8 else 8
        elif node.target == MATMUL_NBITS:
            _, codes, scales, bits, block, _ = node.args
            rows, blocks = program.tensor(str(scales.target)).shape
            columns = blocks * block
        else:
            continue
        fqn = program.fqn(str(codes.target)).removesuffix(".codes")
        found[fqn] = LoweredWeight(
            codes=program.tensor(str(codes.target)),
            scales=program.tensor(str(scales.target)),
            bits=bits,
            block_size=block,
            rows=rows,
            columns=columns,
        )
    return found
