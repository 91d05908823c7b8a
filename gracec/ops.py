"""The operators of `gracec.quant.ops` and `gracec.quant.ops_onnx`, under their public name."""

from gracec.quant.ops import (
    conv2d,
    dequantize,
    dtype_name,
    fake_quantize,
    fake_quantize_activation,
    last_positions,
    quantize_dequantize,
    segment_attention,
)
from gracec.quant.ops_onnx import (
    attention,
    dequantize_activation,
    dequantize_linear,
    matmul_nbits,
    quantize_activation,
    rms_norm,
    rotary_embedding,
)

__all__ = [
    "attention",
    "conv2d",
    "dequantize",
    "dequantize_activation",
    "dequantize_linear",
    "dtype_name",
    "fake_quantize",
    "fake_quantize_activation",
    "last_positions",
    "matmul_nbits",
    "quantize_activation",
    "quantize_dequantize",
    "rms_norm",
    "rotary_embedding",
    "segment_attention",
]
