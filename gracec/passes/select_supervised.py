"""select-supervised: compute logits at the supervised positions only.

    logits [B, T, V] = head(x [B, T, d])
    ->  logits [S, V] = head(flatten(x)[supervised_index])

`supervised_index` int64 [S] is a new input: the flat positions b * T + t whose next token is a
target. Loss functions look at nothing else, and with a vocabulary of 150,000 the full logits are
the largest tensor of a training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.export import Dim

from gracec.ir.program import Program, annotate, annotation
from gracec.passes.base import Pass, PassResult

aten = torch.ops.aten
INDEX = "supervised_index"
ANY_SHAPE = {
    aten.to.dtype,
    aten._to_copy.default,
    aten.div.Tensor,
    aten.mul.Tensor,
    aten.tanh.default,
    aten.softmax.int,
    aten.log_softmax.int,
}
"""Ops that may follow the head: they mean the same on [S, V] as on [B, T, V]."""


@dataclass(frozen=True)
class SelectSupervised(Pass):
    name: ClassVar[str] = "select-supervised"
    keeps_numerics: ClassVar[bool] = False  # a smaller matmul may sum in another order

    def requires(self, program: Program) -> None:
        if INDEX in program.example_inputs:
            return
        heads = list(program.nodes(part="head"))
        if not heads:
            raise self.refuse("the head is unknown", fix="run analyze-modality first")
        if any("adapter" in annotation(head) for head in heads):
            raise self.refuse(
                "the head has an adapter in float, and is trained without one only",
                fix='merge it (adapters="merge")',
            )
        if len(heads) > 1:
            raise self.refuse(f"{len(heads)} matmuls come after the last block, one is the head")
        node = program.outputs["logits"]
        while node is not heads[0]:
            if node.target not in ANY_SHAPE:
                raise self.refuse(f"{node.target} follows the head and depends on the shape")
            node = node.all_input_nodes[0]

    def apply(self, program: Program) -> PassResult:
        if INDEX in program.example_inputs:
            return PassResult(program, False)
        (head,) = program.nodes(part="head")
        hidden = head.args[0]
        assert isinstance(hidden, fx.Node)
        batch, length = program.example_inputs[self._ids(program)[0]].shape
        example = torch.arange(1, batch * length, 3, device=program.device)
        index = program.add_input(INDEX, example, {0: Dim.DYNAMIC})
        annotate(index, role=INDEX)
        with program.graph.inserting_before(head):
            flat = program.graph.call_function(aten.flatten.using_ints, (hidden, 0, 1))
            chosen = program.graph.call_function(aten.index_select.default, (flat, 0, index))
        flat.meta["val"] = hidden.meta["val"].flatten(0, 1)
        chosen.meta["val"] = flat.meta["val"].new_empty(
            (index.meta["val"].shape[0], flat.meta["val"].shape[1])
        )
        for node in (flat, chosen):
            node.meta["nn_module_stack"] = dict(head.meta.get("nn_module_stack") or {})
            annotate(node, modality="fused")
        head.update_arg(0, chosen)
        self._reshape_values(head, program.outputs["logits"], index)
        return PassResult(program, True, (f"logits only at {INDEX}",))

    def ensures(self, before: Program, after: Program) -> None:
        if after.outputs["logits"].meta["val"].dim() != 2:
            raise self.refuse("the logits still have a position axis")

    @staticmethod
    def _ids(program: Program) -> list[str]:
        return [str(node.target) for node in program.nodes(role="token_ids")]

    @staticmethod
    def _reshape_values(head: fx.Node, logits: fx.Node, index: fx.Node) -> None:
        """Example values of the head and of what follows it: [S, V] instead of [B, T, V]."""
        node, rows = logits, index.meta["val"].shape[0]
        while True:
            old = node.meta["val"]
            node.meta["val"] = old.new_empty((rows, old.shape[-1]))
            if node is head:
                return
            node = node.all_input_nodes[0]
