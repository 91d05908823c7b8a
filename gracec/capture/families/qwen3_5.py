"""Qwen3.5: the tower of Qwen3-VL without DeepStack, and a decoder most of whose blocks have linear
attention, a state in the place of keys and values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Family, Inputs
from gracec.capture.families.qwen3_vl import Qwen3VL
from gracec.quant.ops_delta_rule import IN_PLACE_OF, gated_delta_rule


class Qwen35(Qwen3VL):
    model_type: ClassVar[str] = "qwen3_5"
    serving_refusal: ClassVar[str] = (
        "has no serving graphs: linear attention has states that each step replaces, and the "
        "decoder graph has keys and values that grow"
    )

    def encoder_outputs(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        return Family.encoder_outputs(self, model, inputs)

    def logits(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        with _one_operator(model):
            return Family.logits(self, model, inputs)


class Qwen35Moe(Qwen35):
    """The same with routed experts in the decoder, beside one that is always asked."""

    model_type: ClassVar[str] = "qwen3_5_moe"


@contextmanager
def _one_operator(model: PreTrainedModel) -> Iterator[None]:
    """The model's own loop has as many steps as the sequence has chunks: no trace knows them."""
    code: Any = sys.modules[type(model).__module__]
    usual = code.torch_chunk_gated_delta_rule

    def rule(
        query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        return gated_delta_rule(query, key, value, g, beta), None

    setattr(rule, IN_PLACE_OF, usual)
    code.torch_chunk_gated_delta_rule = rule
    try:
        yield
    finally:
        code.torch_chunk_gated_delta_rule = usual
