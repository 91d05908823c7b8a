"""The operators that gracec adds to a graph: for weights and for activations, one to train with and
one that it freezes to; attention of packed sequences; and for ONNX the operators that have no ATen
equivalent.

    gracec::fake_quantize             -> gracec::dequantize
    gracec::fake_quantize_activation  -> gracec::quantize_dequantize
    gracec::dequantize                -> gracec::dequantize_linear, gracec::matmul_nbits
    gracec::quantize_dequantize       -> gracec::quantize_activation, gracec::dequantize_activation
    gracec::last_positions               (its result has as many positions as an input says)
    gracec::conv2d                       (a convolution whose weight is a matrix)
    gracec::segment_lengths,
    gracec::segment_attention            (of images of several sizes, packed into one sequence)

Each is one node with a registered gradient, so that it survives re-export and saving as one node
and keeps only its inputs for backward; a composition of ATen ops would keep several weight-sized
intermediates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gracec.quant import codes as quant

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
    scale_signs: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize a weight [N, K] with trainable scales [N, K / group_size].

    Returns [N, K] in `output_dtype`. Gradients: straight-through for the rounding, none for weights
    that were clipped, and for the scale the derivative of q(w/s)*s with respect to the parameter,
    which stands for its magnitude. `scale_signs`, int8 [N, K / group_size], says which scales are
    negative and has no gradient.
    """
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid, scale_signs)
    return quant.fake_quantize(weight, scales, bits, group_size, _DTYPES[output_dtype])


@fake_quantize.register_fake
def _(
    weight: Tensor,
    scale_param: Tensor,
    bits: int,
    group_size: int,
    parametrization: str = "log",
    scale_grid: str = "bf16",
    output_dtype: str = "float32",
    scale_signs: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(weight, dtype=_DTYPES[output_dtype])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale_param, bits, group_size, parametrization, scale_grid, _, scale_signs = inputs
    ctx.save_for_backward(weight, scale_param, scale_signs)
    ctx.options = (bits, group_size, parametrization, scale_grid)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale_param, scale_signs = ctx.saved_tensors
    gradients = fake_quantize_gradients(
        weight, scale_param, scale_signs, grad_output, *ctx.options, out=torch.empty_like(weight)
    )
    return *gradients, None, None, None, None, None, None


def fake_quantize_gradients(
    weight: Tensor,
    scale_param: Tensor,
    scale_signs: Tensor | None,
    grad: Tensor,
    bits: int,
    group_size: int,
    parametrization: str,
    scale_grid: str,
    *,
    out: Tensor,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight [N, K] and of the scale parameter from that of `fake_quantize`.

    Linear in `grad`: of a sum of gradients it is the sum of what each would give.

    Args:
        grad: [N, K], any float dtype.
        out: [N, K] for the gradient of the weight, in its dtype; may be `grad` itself.
        rows: how many the weight has, if this is a part of them; LSQ divides by what it counts.
    """
    lowest, highest = quant.code_range(bits)
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid, scale_signs)
    per_group = (len(weight), weight.shape[1] // group_size)
    grad_scale = torch.empty(per_group, dtype=torch.float32, device=weight.device)
    for part, scale, grad_part, weight_target, scale_target in quant.row_chunks(
        weight, scales, grad, out, grad_scale
    ):
        incoming = quant.grouped(grad_part.to(torch.float32), group_size)
        ratio = quant.grouped(part.to(torch.float32), group_size) / scale.unsqueeze(-1)
        codes = torch.round(ratio)
        clipped = codes.clamp(lowest, highest)
        # 0 or 1 as a float: a tensor of booleans is several times slower to compute with.
        inside = codes.eq_(clipped)
        step = clipped.addcmul_(inside, ratio, value=-1).mul_(incoming)
        torch.sum(step, -1, out=scale_target)
        torch.mul(incoming, inside, out=quant.grouped(weight_target, group_size))
    grad_scale = grad_scale.sum_to_size(scales.shape)
    per_scale = group_size * (1 if scales.shape == per_group else rows or len(weight))
    grad_param = _scale_gradient(
        grad_scale, scale_param, scales, parametrization, per_scale, highest
    )
    return out, grad_param.to(scale_param.dtype)


def _scale_gradient(
    grad_scale: Tensor,
    scale_param: Tensor,
    scales: Tensor,
    parametrization: str,
    per_scale: int,
    highest: int,
) -> Tensor:
    """From the gradient of the scale to that of its parameter; LSQ divides by sqrt(N * q_max)."""
    if parametrization == "log":
        return grad_scale * scales
    return grad_scale * scales.sign() * scale_param.sign() / math.sqrt(per_scale * highest)


fake_quantize.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("gracec::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scales: Tensor, group_size: int, output_dtype: str = "float32"
) -> Tensor:
    """Codes times scales float32 [N, K / group_size], as `output_dtype` [N, K].

    Codes are int8 [N, K], or uint8 [N, K / 2] with two in a byte, the low nibble first.
    """
    return quant.dequantize(codes, scales, group_size, _DTYPES[output_dtype])


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, group_size: int, output_dtype: str = "float32") -> Tensor:
    return codes.new_empty(quant.codes_shape(codes), dtype=_DTYPES[output_dtype])


def _conv2d(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution of x [B, C, H, W] with the weight that a matrix [O, C / groups * kh * kw] is
    a view of, so that it is quantized as the matrix of a linear is."""
    weight = matrix.view(len(matrix), -1, *kernel)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


conv2d = torch.library.custom_op("gracec::conv2d", _conv2d, mutates_args=())
conv2d.register_fake(_conv2d)


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, matrix, bias, *options = inputs
    ctx.save_for_backward(x, matrix)
    ctx.options = (bias is not None, *options)


def _convolution_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, matrix = ctx.saved_tensors
    has_bias, kernel, stride, padding, dilation, groups = ctx.options
    rows = len(matrix)
    wanted = [*ctx.needs_input_grad[:2], has_bias and ctx.needs_input_grad[2]]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        matrix.view(rows, -1, *kernel),
        [rows] if has_bias else None,
        *(stride, padding, dilation),
        *(False, [0, 0], groups),  # neither transposed nor with padding of the output
        wanted,
    )
    grad_matrix = None if grad_weight is None else grad_weight.reshape(matrix.shape)
    return grad_x, grad_matrix, grad_bias, None, None, None, None, None


conv2d.register_autograd(_convolution_backward, setup_context=_save_convolution)


@torch.library.custom_op("gracec::fake_quantize_activation", mutates_args=())
def fake_quantize_activation(
    x: Tensor,
    scale_param: Tensor,
    zero_points: Tensor,
    bits: int,
    parametrization: str = "log",
    scale_grid: str = "bf16",
) -> Tensor:
    """Quantize and dequantize an activation [..., K] with trainable scales.

    One scale and zero point for the whole tensor ([1]), for each feature ([K]) or for each group of
    consecutive features ([K / group_size]). Returns the dtype of `x`. Gradients are
    straight-through inside the range and zero for values that were clipped.
    """
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid)
    return quant.quantize_dequantize_activation(x, scales, zero_points, bits)


@fake_quantize_activation.register_fake
def _(
    x: Tensor,
    scale_param: Tensor,
    zero_points: Tensor,
    bits: int,
    parametrization: str = "log",
    scale_grid: str = "bf16",
) -> Tensor:
    return torch.empty_like(x)


def _save_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale_param, zero_points, bits, parametrization, scale_grid = inputs
    ctx.save_for_backward(x, scale_param, zero_points)
    ctx.options = (bits, parametrization, scale_grid)


def _activation_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, scale_param, zero_points = ctx.saved_tensors
    bits, parametrization, scale_grid = ctx.options
    lowest, highest = quant.code_range(bits)
    scales = quant.scale_from_param(scale_param, parametrization, scale_grid)
    features = x.shape[-1]
    s = quant.spread(scales, features)
    offset = quant.spread(zero_points, features)
    ratio = x.to(torch.float32) / s
    shifted = torch.round(ratio) + offset
    inside = (shifted >= lowest) & (shifted <= highest)
    grad = grad_output.to(torch.float32)
    codes = shifted.clamp(lowest, highest) - offset
    step = torch.where(inside, codes - ratio, codes)
    grouped = (grad * step).reshape(-1, scales.numel(), features // scales.numel())
    grad_scale = grouped.sum((0, 2))
    grad_param = _scale_gradient(grad_scale, scale_param, scales, parametrization, x, highest)
    return (grad * inside).to(x.dtype), grad_param.to(scale_param.dtype), None, None, None, None


fake_quantize_activation.register_autograd(_activation_backward, setup_context=_save_activation)


@torch.library.custom_op("gracec::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """An activation [..., K] on its integer grid: what `fake_quantize_activation` freezes to."""
    return quant.quantize_dequantize_activation(x, scales, zero_points, bits)


@quantize_dequantize.register_fake
def _(x: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gracec::last_positions", mutates_args=())
def last_positions(x: Tensor, count: Tensor) -> Tensor:
    """The last `count` (int64 []) positions of x [B, T, H], or all of them for 0."""
    return x[:, -int(count) :].clone()


@last_positions.register_fake
def _(x: Tensor, count: Tensor) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((x.shape[0], kept, x.shape[2]))


@torch.library.custom_op("gracec::segment_lengths", mutates_args=())
def segment_lengths(segments: Tensor) -> Tensor:
    """How long each segment is, int64 [P] on the CPU, with zeros behind the last one.

    A device is asked for it once, and not by each attention over the same segments and again by
    its gradient.

    Args:
        segments: int64 [P]; positions of one segment are next to each other.
    """
    lengths = torch.unique_consecutive(segments, return_counts=True)[1].cpu()
    return torch.nn.functional.pad(lengths, (0, len(segments) - len(lengths)))


@segment_lengths.register_fake
def _(segments: Tensor) -> Tensor:
    return segments.new_empty(segments.shape, device="cpu")


@torch.library.custom_op("gracec::segment_attention", mutates_args=())
def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention among the positions of the same segment, one segment after the other.

    The memory it takes grows with the longest segment; a mask over all positions would take the
    square of their number.

    Args:
        query, key, value: [1, H, P, D].
        lengths: int64 [P] on the CPU, as `segment_lengths` says.

    Returns:
        [1, P, H, D].
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    parts = _segments(lengths, query, key, value)
    found = [attend(q, k, v, scale=scale).transpose(1, 2).contiguous() for q, k, v in parts]
    return torch.cat(found, dim=1).to(query.dtype)


@segment_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float) -> Tensor:
    batch, heads, positions, size = query.shape
    return query.new_empty((batch, positions, heads, size))


@torch.library.custom_op("gracec::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from that of the result [1, P, H, D]."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in _segments(lengths, query, key, value, grad.transpose(1, 2)):
        q, k, v, g = (tensor.to(torch.float32) for tensor in part)
        weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
        by_weight = g @ v.transpose(-1, -2)
        mean = (by_weight * weights).sum(-1, keepdim=True)
        by_score = weights * (by_weight - mean) * scale
        found.append((by_score @ k, by_score.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g))
    grads = [torch.cat(parts, dim=2) for parts in zip(*found, strict=True)]
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


@segment_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t).contiguous() for t in (query, key, value))  # type: ignore[return-value]


def _segments(lengths: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [1, H, P, D] split along P; all in the dtype of the first, as autocast may differ."""
    tensors = tuple(tensor.to(tensors[0].dtype) for tensor in tensors)
    parts = [length for length in lengths.tolist() if length]
    return zip(*(tensor.split(parts, dim=2) for tensor in tensors), strict=True)


def _save_segments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _segments_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*segment_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


segment_attention.register_autograd(_segments_backward, setup_context=_save_segments)
