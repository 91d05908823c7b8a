"""insert-taps: make the hidden states of one decoder block an output beside the logits.

    return logits -> return logits, hidden       hidden [B, T, d]: output of one decoder block

The relational distillation term compares student and teacher at the vision tokens of the
penultimate block. A tap is a graph output and an annotation, no op: an identity op would copy what
it returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gracec.ir.program import Program, annotate
from gracec.passes.base import Pass, PassResult

HIDDEN = "hidden"


@dataclass(frozen=True)
class InsertTaps(Pass):
    """Options: `block`, the decoder block that is tapped; negative numbers count from the end."""

    block: int = -2
    name: ClassVar[str] = "insert-taps"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        blocks = list(program.nodes(role="block_output"))
        if not blocks:
            raise self.refuse("no decoder block is known", fix="run analyze-modality first")
        if not -len(blocks) <= self.block < len(blocks):
            raise self.refuse(
                f"there is no block {self.block}, the decoder has {len(blocks)}",
                fix=f"choose -{len(blocks)} to {len(blocks) - 1}",
            )

    def apply(self, program: Program) -> PassResult:
        node = self._block(program)
        outputs = {**program.outputs, HIDDEN: node}
        if program.outputs == outputs:
            return PassResult(program, False)
        for tapped in program.nodes(tap=HIDDEN):
            annotate(tapped, tap=None)
        annotate(node, tap=HIDDEN)
        program.set_outputs(outputs)
        return PassResult(program, True, (f"block {self.block} is returned as {HIDDEN!r}",))

    def ensures(self, before: Program, after: Program) -> None:
        if after.outputs.get(HIDDEN) is not self._block(after):
            raise self.refuse("the tapped block is not returned")

    def _block(self, program: Program) -> fx.Node:
        return list(program.nodes(role="block_output"))[self.block]
