"""Linear attention as one operator."""

import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from gracec.quant.ops_delta_rule import CHUNK, gated_delta_rule


def drawn(tokens: int) -> list[Tensor]:
    """Two heads of keys for four of values."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (2, tokens, 2, 4), (2, tokens, 4, 8)
    query, key, value = (torch.randn(shape, generator=draw) for shape in (keys, keys, values))
    decay, beta = (torch.rand(values[:3], generator=draw) for _ in range(2))
    return [one.requires_grad_() for one in (query, key, value, -decay, beta)]


def test_it_is_the_loop_of_transformers_and_so_are_its_gradients() -> None:
    for tokens in (3, CHUNK + 6):
        inputs = drawn(tokens)
        found = gated_delta_rule(*inputs)
        query, key, value, decay, beta = inputs
        expected, _ = torch_chunk_gated_delta_rule(
            query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
        )
        assert torch.equal(found, expected)
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((found * weight).sum(), inputs)
        wanted = torch.autograd.grad((expected * weight).sum(), inputs)
        for gradient, want in zip(gradients, wanted, strict=True):
            assert want.any() and torch.equal(gradient, want)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    # Not checked while it traces the gradient, which calls functions that take no fake tensors.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gated_delta_rule, drawn(5), test_utils=checks)
