"""Operators for graphs that become ONNX and have no ATen equivalent; each is one node there too.

gracec::dequantize           ->  gracec::dequantize_linear, gracec::matmul_nbits
gracec::quantize_dequantize  ->  gracec::quantize_activation, gracec::dequantize_activation
gracec::expert_linear        ->  gracec::expert_matmul, gracec::expert_matmul_nbits
gracec::rms_norm, gracec::rotary_embedding, gracec::attention      (what fuse-decoder makes)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gracec.quant import codes as quant
from gracec.quant.ops_experts import multiply_by_expert


@torch.library.custom_op("gracec::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """ONNX DequantizeLinear along axis 0: a weight that is ready for `x @ weight`, float32 [K, N].

    Codes are int8 [K, N], or uint8 [K, N / 2] with two in a byte, the low nibble first; scales are
    float32 [K / block_size, N], or [N] and along axis 1 with a block size of 0.
    """
    if not block_size:
        return quant.read_codes(codes) * scales
    weight = quant.read_codes(codes) * scales.repeat_interleave(block_size, dim=0)
    return weight.to(torch.float32)


@dequantize_linear.register_fake
def _(codes: Tensor, scales: Tensor, block_size: int) -> Tensor:
    return codes.new_empty(quant.codes_shape(codes), dtype=torch.float32)


@torch.library.custom_op("gracec::quantize_activation", mutates_args=())
def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """ONNX QuantizeLinear: uint8 codes of x [..., K]; scale float32 [], zero point uint8 []."""
    return (torch.round(x / scale) + zero_point).clamp(0, 255).to(torch.uint8)


@quantize_activation.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("gracec::dequantize_activation", mutates_args=())
def dequantize_activation(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """ONNX DequantizeLinear: float32 [..., K] of uint8 codes; scale and zero point as above."""
    return (codes.to(torch.float32) - zero_point) * scale


@dequantize_activation.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("gracec::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, block_size: int, accuracy_level: int
) -> Tensor:
    """MatMulNBits of ONNX Runtime: x [..., K] times a weight [N, K], transposed -> [..., N].

    Codes are uint8 [N, K / block_size, block_size * bits / 8], stored as code + 2^(bits - 1), the
    first one lowest; scales are float32 [N, K / block_size]. The accuracy level says in what the
    runtime may compute (1: float32, 4: int8); here it is float32 always.
    """
    parts = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    unsigned = torch.stack(parts, dim=-1).reshape(*scales.shape, block_size)
    weight = (unsigned.to(torch.float32) - 2 ** (bits - 1)) * scales.unsqueeze(-1)
    return torch.nn.functional.linear(x, weight.reshape(len(scales), -1))


@matmul_nbits.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, block_size: int, accuracy_level: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(scales)))


@torch.library.custom_op("gracec::expert_matmul", mutates_args=())
def expert_matmul(x: Tensor, experts: Tensor, weights: list[Tensor]) -> Tensor:
    """Rows x [S, K] by the weight [K, N] of their expert int64 [S]; [S, N]."""
    return multiply_by_expert(
        x, experts, weights[0].shape[1], lambda expert, rows: rows @ weights[expert]
    )


@expert_matmul.register_fake
def _(x: Tensor, experts: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[1]))


@torch.library.custom_op("gracec::expert_matmul_nbits", mutates_args=())
def expert_matmul_nbits(
    x: Tensor,
    experts: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    """The same, with the codes and scales of `matmul_nbits` for each expert."""
    return multiply_by_expert(
        x,
        experts,
        scales[0].shape[0],
        lambda expert, rows: matmul_nbits(
            rows, codes[expert], scales[expert], bits, block_size, accuracy_level
        ),
    )


@expert_matmul_nbits.register_fake
def _(
    x: Tensor,
    experts: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    return x.new_empty((x.shape[0], scales[0].shape[0]))


@torch.library.custom_op("gracec::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """ONNX RMSNormalization of x [..., H] over its last dimension, times a weight [H]."""
    normed: Tensor = torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)
    return normed


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gracec::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """ONNX RotaryEmbedding: turns the halves of each head of x [B, S, heads * D].

    `cos` and `sin` are [B, S, D / 2].
    """
    first, second = x.unflatten(-1, (heads, 2, -1)).unbind(-2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return turned.reshape(x.shape)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gracec::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    scale: float,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX Attention with a cache, each key head read by heads / kv_heads query heads.

    Args:
        q: [B, S, heads * D].
        k, v: [B, S, kv_heads * D].
        past_key, past_value: [B, kv_heads, P, D].
        mask: bool [B, 1, S, P + S], true where a position may be looked at.

    Returns:
        [B, S, heads * D], and the keys and values [B, kv_heads, P + S, D] of all positions.
    """

    def split(x: Tensor, count: int) -> Tensor:
        headed: Tensor = x.unflatten(-1, (count, -1)).transpose(1, 2)
        return headed

    keys = torch.cat((past_key, split(k, kv_heads)), dim=2)
    values = torch.cat((past_value, split(v, kv_heads)), dim=2)
    found = torch.nn.functional.scaled_dot_product_attention(
        split(q, heads), keys, values, mask, scale=scale, enable_gqa=heads != kv_heads
    )
    return found.transpose(1, 2).flatten(2), keys, values


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    scale: float,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, past, size = past_key.shape
    grown = past_key.new_empty((batch, kv_heads, past + q.shape[1], size))
    return torch.empty_like(q), grown, torch.empty_like(grown)
