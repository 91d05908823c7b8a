"""The operator of linear attention: a state that each token decays, corrects and reads.

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  y = S^T q

transformers computes it chunk by chunk, as many as the sequence has, and solves a triangular system
in each. No trace can hold that loop, and what transformers writes into a graph instead rounds
otherwise. So the loop is inside one operator, which calls the function that the model calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 64
"""Tokens that are computed at once."""
IN_PLACE_OF = "gracec_in_place_of"
"""Attribute of a function that calls the operator: the one of transformers that it replaces."""


@torch.library.custom_op("gracec::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> Tensor:
    """Linear attention of whole sequences that begin with an empty state.

    Args:
        query, key: [B, T, G, K]; they are brought to length 1.
        value: [B, T, H, V], where G divides H.
        decay: [B, T, H], the logarithm of what remains of the state.
        beta: [B, T, H], how much of it is corrected.

    Returns:
        [B, T, H, V] in the dtype of `query`.
    """
    return _applied(_rule(), query, key, value, decay, beta).contiguous()


@gated_delta_rule.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return query.new_empty(value.shape)


@torch.library.custom_op("gracec::gated_delta_rule_backward", mutates_args=())
def gated_delta_rule_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all inputs, from that of the result [B, T, H, V].

    Those of the loop in torch, which is computed once more: only inputs are kept until then.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5

    rule: Any = modeling_qwen3_5.torch_chunk_gated_delta_rule
    loop = getattr(
        rule, "__wrapped__", rule
    )  # a kernel of another package has a gradient of its own

    def apply(*inputs: Tensor) -> Tensor:
        return _applied(loop, *inputs)

    backward: Any
    _, backward = torch.func.vjp(apply, query, key, value, decay, beta)  # type: ignore[misc]
    found = (one.clone(memory_format=torch.contiguous_format) for one in backward(grad))
    return tuple(found)


@gated_delta_rule_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(one.new_empty(one.shape) for one in (query, key, value, decay, beta))  # type: ignore[return-value]


def _rule() -> Any:
    """The function that the model calls, also while the operator stands in its place."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    found: Any = modeling_qwen3_5.torch_chunk_gated_delta_rule
    return getattr(found, IN_PLACE_OF, found)


def _applied(
    rule: Any, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> Tensor:
    found: Tensor
    found, _ = rule(query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    return found


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = gated_delta_rule_backward(grad, *ctx.saved_tensors)
    return found


gated_delta_rule.register_autograd(_backward, setup_context=_save)
