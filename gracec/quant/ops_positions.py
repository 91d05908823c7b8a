"""The operator of learned positions that are resized to the shape of each image.

The shapes are data, so no trace can hold the sizes that follow from them; the interpolation, which
transformers does image by image, is inside one operator, which calls the function that it calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gracec::resized_positions", mutates_args=())
def resized_positions(positions: Tensor, shapes: Tensor, length: int) -> Tensor:
    """Learned positions [S, S, H], interpolated to the rows and columns of each image.

    Args:
        shapes: int64 [I, 2].
        length: of the result, P; what is beyond an image has the position of its first place.

    Returns:
        [I, P, H].
    """
    return _resized(positions, shapes, length)


@resized_positions.register_fake
def _(positions: Tensor, shapes: Tensor, length: int) -> Tensor:
    return positions.new_empty((shapes.shape[0], length, positions.shape[-1]))


@torch.library.custom_op("gracec::resized_positions_backward", mutates_args=())
def resized_positions_backward(grad: Tensor, positions: Tensor, shapes: Tensor) -> Tensor:
    """The gradient of the positions [S, S, H] from that of the result [I, P, H]."""

    def resized(positions: Tensor) -> Tensor:
        each = shapes.unsqueeze(1)  # a tensor that is filled image by image has no such gradient
        return torch.cat([_resized(positions, shape, grad.shape[1]) for shape in each])

    backward: Any
    _, backward = torch.func.vjp(resized, positions)  # type: ignore[misc]
    (found,) = backward(grad)
    return found.clone(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]


@resized_positions_backward.register_fake
def _(grad: Tensor, positions: Tensor, shapes: Tensor) -> Tensor:
    return positions.new_empty(positions.shape)


def _resized(positions: Tensor, shapes: Tensor, length: int) -> Tensor:
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    resize: Any = Siglip2VisionEmbeddings.resize_positional_embeddings
    found: Tensor = resize(positions, shapes, length)
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    positions, shapes, _ = inputs
    ctx.save_for_backward(positions, shapes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return resized_positions_backward(grad, *ctx.saved_tensors), None, None


resized_positions.register_autograd(_backward, setup_context=_save)
