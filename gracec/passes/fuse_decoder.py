"""fuse-decoder: one operator for each norm, rotary embedding and attention of a decoder.

    w * (x * rsqrt(mean(x^2) + eps))              ->  rms_norm(x, w, eps)
    x * cos + cat(-x[h:], x[:h]) * sin            ->  rotary_embedding(x, cos, sin)
    cat(past, k), cat(past, v), repeat, attention ->  attention(q, k, v, past_k, past_v, mask)

They are what opset 23 of ONNX calls RMSNormalization, RotaryEmbedding and Attention. A runtime
needs some microseconds for an operator, however small, and a token of a small decoder is hundreds
of them. Whatever does not have exactly these forms stays as it is. The notes count what is fused,
and say why each of the others is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gracec.ir.program import Program
from gracec.passes.base import Pass, PassResult
from gracec.passes.fusions.attention import ATTENTIONS
from gracec.passes.fusions.norm import NORM
from gracec.passes.fusions.rotary import ROTARY
from gracec.passes.rewrite import Rewrite, rewrite
from gracec.passes.strip import drop_dead

RULES: tuple[Rewrite[Any], ...] = (NORM, ROTARY, ATTENTIONS)
"""In this order: an attention reads what is turned, as a projection seen as heads."""


@dataclass(frozen=True)
class FuseDecoder(Pass):
    """No options."""

    name: ClassVar[str] = "fuse-decoder"
    keeps_numerics: ClassVar[bool] = False

    def apply(self, program: Program) -> PassResult:
        nodes = len(program.graph.nodes)
        drop_dead(program)  # what no output depends on is nobody's norm
        modified = len(program.graph.nodes) != nodes
        done = rewrite(program, RULES)
        drop_dead(program)
        modified |= done.modified
        return PassResult(program, modified, (*done.refusals, done.summary))
