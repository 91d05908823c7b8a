"""lower-torchao: run frozen weights with torchao INT4 kernels.

    linear(x, dequantize(codes, scales)) -> linear(x, packed)      packed: a torchao INT4 tensor
    expert_linear(x, dequantize(codes, scales), experts) -> packed_expert_linear(x, [packed, ...])

The kernels take matrices, so that of each expert is packed by itself; all of them are, or none is.

The lowered node calls `torch.nn.functional.linear`, which torchao overrides; `aten.linear` would be
decomposed before torchao sees it. A weight that no kernel takes becomes a dense weight with the
same values; it is named in the notes, and in strict mode that is an error. Every packed weight is
read back and compared with codes * scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gracec._memory import trim
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import EXPERT_LINEAR
from gracec.kernels import torchao
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import DEQUANTIZE, FrozenNode, drop_dead_tensors, frozen_nodes
from gracec.quant.frozen import FrozenWeight, by_matrix


@dataclass(frozen=True)
class LowerTorchao(Pass):
    """Options: `strict` refuses weights that no INT4 kernel takes."""

    strict: bool = False
    name: ClassVar[str] = "lower-torchao"
    keeps_numerics: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        lowered = any("kernel" in annotation(node) for node in program.graph.nodes)
        if not any(program.nodes(DEQUANTIZE)) and not lowered:
            raise self.refuse("no weight is frozen to codes", fix="run freeze first")

    def apply(self, program: Program) -> PassResult:
        notes = []
        nodes = frozen_nodes(program)
        lowered: dict[str, dict[str, str]] = {}  # what stands for a weight, by what it is called
        for found in nodes:
            node, target, fqn, frozen = found
            if not node.users:
                program.graph.erase_node(node)
                continue
            if target not in lowered:
                reason = self._refusal(program, [one for one in nodes if one.target == target])
                if reason and self.strict:
                    raise self.refuse(reason, where=fqn, fix="change the recipe or drop strict")
                if reason or frozen is None:
                    notes.append(f"{fqn} runs dense: {reason}")
                    weights: dict[str, Tensor] = {"": found.dense(program)}
                else:
                    weights = {
                        name.removeprefix(fqn): self._packed(one, program.dtype, name)
                        for name, one in by_matrix(fqn, frozen).items()
                    }
                lowered[target] = {f"{target}{end.replace('.', '_')}": end for end in weights}
                for name, end in lowered[target].items():
                    program.set_tensor(name, nn.Parameter(weights[end], requires_grad=False))
                    program.fqns[name] = (f"{fqn}{end}",)
            with program.graph.inserting_before(node):
                operands = [program.graph.get_attr(name) for name in lowered[target]]
            for operand in operands:
                operand.meta = dict(node.meta)
            packed = isinstance(program.tensor(next(iter(lowered[target]))), torchao.PackedWeight)
            for user in list(node.users):
                annotate(user, kernel="int4" if packed else "dense")
                if packed and user.target == EXPERT_LINEAR:
                    user.target = torchao.packed_expert_linear
                    user.args = (user.args[0], operands, user.args[2])
                elif packed:
                    user.target = torch.nn.functional.linear
            if node.users:
                node.replace_all_uses_with(operands[0])
            program.graph.erase_node(node)
        drop_dead_tensors(program)
        notes.append(f"{len(lowered_weights(program))} weights run on INT4 kernels")
        return PassResult(program, bool(nodes), tuple(notes))

    @staticmethod
    def _refusal(program: Program, nodes: Sequence[FrozenNode]) -> str:
        """Why the weight that these nodes stand for cannot be packed, or ""."""
        for found in nodes:
            for reader in found.node.users:
                reason = found.refusal(reader, torch.ops.aten.linear.default, EXPERT_LINEAR)
                if reason:
                    return reason
        frozen = nodes[0].weight
        assert frozen is not None
        return torchao.refusal(frozen.matrix_shape, frozen.spec, program.dtype, program.device)

    def ensures(self, before: Program, after: Program) -> None:
        if any(after.nodes(DEQUANTIZE)):
            raise self.refuse("a dequantize node is left")

    def _packed(self, frozen: FrozenWeight, dtype: torch.dtype, fqn: str) -> torchao.PackedWeight:
        packed = torchao.pack(frozen.codes, frozen.scales, frozen.group_size, dtype)
        difference = torchao.read_back_difference(
            packed, frozen.stored, frozen.scales, frozen.group_size
        )
        if difference:
            raise self.refuse(f"the packed weight reads back wrong, {difference}", where=fqn)
        trim()
        return packed


def lowered_weights(program: Program) -> dict[str, torchao.PackedWeight]:
    """FQN -> packed weight of every linear that runs on an INT4 kernel; those of experts by
    `<fqn>.<number>`."""
    found = {}
    for node in program.graph.find_nodes(op="get_attr"):
        tensor = program.tensor(str(node.target))
        if isinstance(tensor, torchao.PackedWeight):
            found[program.fqn(str(node.target))] = tensor
    return found
