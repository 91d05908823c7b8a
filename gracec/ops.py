"""The two operators that gracec adds to a graph.

`gracec::fake_quantize` is one node with a registered gradient, so that it survives re-export and
saving as one node and keeps only the weight and the scale for backward; a composition of ATen ops
would keep several weight-sized intermediates. `gracec::dequantize` is what it becomes when frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gracec import quant

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32; the spelling used in graphs and files."""
    return str(dtype).removeprefix("torch.")


@torch.library.custom_op("gracec::fake_quantize", mutates_args=())
def fake_quantize(
    weight: Tensor,
    scale_param: Tensor,
    bits: int,
    group_size: int,
    parametrization: str = "log",
    scale_grid: str = "bf16",
    output_dtype: str = "float32",
) -> Tensor:
    """Quantize and dequantize a weight [N, K] with trainable scales [N, K / group_size].

    Returns [N, K] in `output_dtype`. Gradients: straight-through for the rounding, none for weights
    that were clipped, and for the scale the derivative of q(w/s)*s with respect to the parameter.
    """
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid)
    codes = quant.quantize(weight, scales, bits, group_size)
    return quant.dequantize(codes, scales, group_size, _DTYPES[output_dtype])


@fake_quantize.register_fake
def _(
    weight: Tensor,
    scale_param: Tensor,
    bits: int,
    group_size: int,
    parametrization: str = "log",
    scale_grid: str = "bf16",
    output_dtype: str = "float32",
) -> Tensor:
    return torch.empty_like(weight, dtype=_DTYPES[output_dtype])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale_param, bits, group_size, parametrization, scale_grid, _ = inputs
    ctx.save_for_backward(weight, scale_param)
    ctx.options = (bits, group_size, parametrization, scale_grid)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale_param = ctx.saved_tensors
    bits, group_size, parametrization, scale_grid = ctx.options
    lowest, highest = quant.code_range(bits)
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid)
    grouped_shape = (*scales.shape, group_size)
    s = scales.unsqueeze(-1)
    grad = grad_output.to(torch.float32).reshape(grouped_shape)
    ratio = weight.to(torch.float32).reshape(grouped_shape) / s
    codes = torch.round(ratio)
    inside = (codes >= lowest) & (codes <= highest)
    grad_weight = (grad * inside).reshape(weight.shape).to(weight.dtype)
    step = torch.where(inside, codes - ratio, codes.clamp(lowest, highest))
    grad_scale = (grad * step).sum(-1)
    if parametrization == "log":
        grad_param = grad_scale * scales
    else:
        grad_param = grad_scale * scale_param.sign() / (group_size * highest) ** 0.5
    return grad_weight, grad_param.to(scale_param.dtype), None, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("gracec::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scales: Tensor, group_size: int, output_dtype: str = "float32"
) -> Tensor:
    """codes int8 [N, K] times scales float32 [N, K / group_size], as `output_dtype` [N, K]."""
    return quant.dequantize(codes, scales, group_size, _DTYPES[output_dtype])


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, group_size: int, output_dtype: str = "float32") -> Tensor:
    return torch.empty_like(codes, dtype=_DTYPES[output_dtype])
