"""Learned positions, resized to the shapes of images."""

import pytest
import torch
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from gracec.quant.ops_positions import resized_positions

SHAPES = torch.tensor([[2, 4], [6, 2], [4, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_transformers_and_so_are_their_gradients(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(4, 4, 8, generator=draw).to(dtype).requires_grad_()
    found = resized_positions(table, SHAPES, 18)
    resize = Siglip2VisionEmbeddings.resize_positional_embeddings
    expected = resize(table, SHAPES, 18)
    assert torch.equal(found, expected)
    weight = torch.randn(found.shape, generator=draw).to(dtype)
    (gradient,) = torch.autograd.grad((found * weight).sum(), table)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), table)
    close = 1e-6 if dtype == torch.float32 else 0.02  # images are added up in another order
    torch.testing.assert_close(gradient, wanted, rtol=close, atol=close)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    table = torch.randn(4, 4, 8).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(resized_positions, (table, SHAPES, 18), test_utils=checks)
