"""The operator of codes whose scales learn: what `gracec::dequantize` is while they do.

    w = s q          s = sign · grid(exp p)          dL/dp_g = s_g Σ_{k in g} q_k dL/dw_k

The codes q are integers and get no gradient, so that a weight takes half a byte for each of its
elements in training, and the optimizer a few floats for each of its groups. The rounding of s to
its grid is passed straight through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gracec.quant import codes as quant


@torch.library.custom_op("gracec::scale_codes", mutates_args=())
def scale_codes(
    codes: Tensor,
    scale_param: Tensor,
    scale_signs: Tensor | None,
    group_size: int,
    parametrization: str,
    scale_grid: str,
    output_dtype: str,
) -> Tensor:
    """Codes times trainable scales, as `output_dtype` [N, K], [E * N, K] of experts.

    Args:
        codes: int8 [N, K], or uint8 [N, K / 2] with two in a byte, the low nibble first.
        scale_param: float32 [N, K / group_size], or [1, 1] for the whole: the logarithm ("log") or
            the value ("lsq") of the magnitude of each scale. The only operand with a gradient,
            which for "lsq" is not divided by anything: nothing else learns beside it.
        scale_signs: int8 of the same shape, 1 or -1; None where every scale is positive.
    """
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid, scale_signs)
    return quant.dequantize(codes, scales, group_size, getattr(torch, output_dtype))


@scale_codes.register_fake
def _(
    codes: Tensor,
    scale_param: Tensor,
    scale_signs: Tensor | None,
    group_size: int,
    parametrization: str,
    scale_grid: str,
    output_dtype: str,
) -> Tensor:
    return codes.new_empty(quant.codes_shape(codes), dtype=getattr(torch, output_dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scale_param, scale_signs, *options, _ = inputs
    ctx.save_for_backward(codes, scale_param, scale_signs)
    ctx.options = options


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale_param, scale_signs = ctx.saved_tensors
    found = scale_codes_gradient(codes, scale_param, scale_signs, grad_output, *ctx.options)
    return None, found, None, None, None, None, None


def scale_codes_gradient(
    codes: Tensor,
    scale_param: Tensor,
    scale_signs: Tensor | None,
    grad: Tensor,
    group_size: int,
    parametrization: str,
    scale_grid: str,
) -> Tensor:
    """Gradient of the scale parameter from that of `scale_codes`, [N, K] in any float dtype."""
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid, scale_signs)
    rows, columns = quant.codes_shape(codes)
    per_group = torch.empty((rows, columns // group_size), dtype=torch.float32, device=grad.device)
    for part, grad_part, target in quant.row_chunks(codes, grad, per_group):
        incoming = quant.grouped(grad_part.to(torch.float32), group_size)
        torch.sum(incoming * quant.grouped(quant.read_codes(part), group_size), -1, out=target)
    grad_scale = per_group.sum_to_size(scales.shape)
    slope = scales if parametrization == "log" else scales.sign() * scale_param.sign()
    return (grad_scale * slope).to(scale_param.dtype)


scale_codes.register_autograd(_backward, setup_context=_save)
