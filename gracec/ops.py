"""The operators of `gracec.quant.ops` and its `ops_*`, under their public name."""

from gracec.quant.ops import (
    conv2d,
    dequantize,
    dtype_name,
    fake_quantize,
    fake_quantize_activation,
    last_positions,
    quantize_dequantize,
    segment_attention,
    segment_lengths,
)
from gracec.quant.ops_delta_rule import gated_delta_rule
from gracec.quant.ops_experts import expert_linear
from gracec.quant.ops_onnx import (
    attention,
    dequantize_activation,
    dequantize_linear,
    expert_matmul,
    expert_matmul_nbits,
    matmul_nbits,
    quantize_activation,
    rms_norm,
    rotary_embedding,
)
from gracec.quant.ops_positions import resized_positions
from gracec.quant.ops_scales import scale_codes

__all__ = [
    "attention",
    "conv2d",
    "dequantize",
    "dequantize_activation",
    "dequantize_linear",
    "dtype_name",
    "expert_linear",
    "expert_matmul",
    "expert_matmul_nbits",
    "fake_quantize",
    "fake_quantize_activation",
    "gated_delta_rule",
    "last_positions",
    "matmul_nbits",
    "quantize_activation",
    "quantize_dequantize",
    "resized_positions",
    "rms_norm",
    "rotary_embedding",
    "scale_codes",
    "segment_attention",
    "segment_lengths",
]
