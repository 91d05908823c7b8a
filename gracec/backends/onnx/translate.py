"""How torch.onnx writes the operators of gracec.

gracec::dequantize_linear   gracec.DequantizeLinear, which `graphs` turns into the standard one:
                            torch has no 4-bit tensors, and the codes go through as bytes
gracec::quantize_activation, gracec::dequantize_activation
                            QuantizeLinear, DequantizeLinear
gracec::matmul_nbits        com.microsoft.MatMulNBits
gracec::conv2d              Conv, where no codes took the place of the matrix
gracec::expert_matmul, gracec::expert_matmul_nbits, gracec::expert_linear
                            for each expert GatherND of its rows, the matmul, ScatterND
gracec::last_positions      Slice from -count to the end, so that 0 keeps everything
gracec::segment_lengths     nothing: what it says is the segments themselves
gracec::segment_attention   Attention with a mask of the segments, [P, P]
aten::bucketize, aten::argsort
                            the number of boundaries below, TopK; torch.onnx has no translation
gracec::rms_norm, gracec::rotary_embedding, gracec::attention
                            RMSNormalization, RotaryEmbedding, Attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import opset23 as op

PLACEHOLDER_DOMAIN, KERNEL_DOMAIN = "gracec", "com.microsoft"
_LAST = 2**63 - 1


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`."""
    ops = torch.ops.gracec
    return {
        ops.dequantize_linear.default: _dequantize_linear,
        ops.quantize_activation.default: _quantize_activation,
        ops.dequantize_activation.default: _dequantize_activation,
        ops.matmul_nbits.default: _matmul_nbits,
        ops.conv2d.default: _conv2d,
        ops.expert_linear.default: _expert_linear,
        ops.expert_matmul.default: _expert_matmul,
        ops.expert_matmul_nbits.default: _expert_matmul_nbits,
        ops.last_positions.default: _last_positions,
        ops.segment_lengths.default: _segment_lengths,
        ops.segment_attention.default: _segment_attention,
        torch.ops.aten.bucketize.Tensor: _bucketize,
        torch.ops.aten.argsort.default: _argsort,
        ops.rms_norm.default: _rms_norm,
        ops.rotary_embedding.default: _rotary_embedding,
        ops.attention.default: _attention,
    }


def _operator(domain: str, name: str, inputs: list[tuple[str, str]], attributes: list[str]) -> Any:
    """An operator that the onnx package knows no schema of."""
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(name, kind) for name, kind in inputs],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT, "") for name in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(domain, 1), name, schema)


_FLOAT, _BYTES = "tensor(float)", "tensor(uint8)"
_DEQUANTIZE = _operator(
    PLACEHOLDER_DOMAIN, "DequantizeLinear", [("X", _BYTES), ("scale", _FLOAT)], ["block_size"]
)
_MATMUL = _operator(
    KERNEL_DOMAIN,
    "MatMulNBits",
    [("A", _FLOAT), ("B", _BYTES), ("scales", _FLOAT)],
    ["K", "N", "bits", "block_size", "accuracy_level"],
)


def _dequantize_linear(codes: Any, scales: Any, block_size: int) -> Any:
    return _DEQUANTIZE(codes, scales, block_size=block_size)


def _quantize_activation(x: Any, scale: Any, zero_point: Any) -> Any:
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize_activation(codes: Any, scale: Any, zero_point: Any) -> Any:
    return op.DequantizeLinear(codes, scale, zero_point)


def _matmul_nbits(
    x: Any, codes: Any, scales: Any, bits: int, block_size: int, accuracy_level: int
) -> Any:
    rows, blocks = scales.shape
    return _MATMUL(
        x,
        codes,
        scales,
        K=blocks * block_size,
        N=rows,
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy_level,
    )


def _conv2d(
    x: Any,
    weight: Any,
    bias: Any,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    shape: Any = op.Constant(value_ints=[weight.shape[0], -1, *kernel_size])
    filters: Any = op.Reshape(weight, shape)
    return op.Conv(
        x,
        filters,
        bias,
        kernel_shape=kernel_size,
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=groups,
    )


def _by_expert(
    x: Any, experts: Any, count: int, features: int, multiply: Callable[[int, Any], Any]
) -> Any:
    """Rows [S, features]; an expert that no row is for multiplies a matrix without rows."""
    first: Any = op.Constant(value_ints=[0])
    rows: Any = op.Gather(op.Shape(x), first)
    shape: Any = op.Concat(rows, op.Constant(value_ints=[features]), axis=0)
    zero: Any = op.Constant(value_float=0.0)
    found: Any = op.Expand(zero, shape)
    for expert in range(count):
        asked = op.Equal(experts, op.Constant(value_int=expert))
        places = op.Transpose(op.NonZero(asked), perm=[1, 0])
        found = op.ScatterND(found, places, multiply(expert, op.GatherND(x, places)))
    return found


def _expert_linear(x: Any, weight: Any, experts: Any, count: int) -> Any:
    rows, columns = weight.shape[-2:]
    features = rows if len(weight.shape) == 3 else rows // count
    shape: Any = op.Constant(value_ints=[count, features, columns])
    each = op.Reshape(weight, shape)

    def multiply(expert: int, x: Any) -> Any:
        number: Any = op.Constant(value_int=expert)
        own = op.Gather(each, number)
        return op.MatMul(x, op.Transpose(own, perm=[1, 0]))

    return _by_expert(x, experts, count, features, multiply)


def _expert_matmul(x: Any, experts: Any, weights: Sequence[Any]) -> Any:
    features = weights[0].shape[1]
    return _by_expert(
        x, experts, len(weights), features, lambda expert, x: op.MatMul(x, weights[expert])
    )


def _expert_matmul_nbits(
    x: Any,
    experts: Any,
    codes: Sequence[Any],
    scales: Sequence[Any],
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Any:
    def multiply(expert: int, x: Any) -> Any:
        own = codes[expert], scales[expert]
        return _matmul_nbits(x, *own, bits, block_size, accuracy_level)

    return _by_expert(x, experts, len(codes), scales[0].shape[0], multiply)


def _last_positions(x: Any, count: Any) -> Any:
    axis: Any = op.Constant(value_ints=[1])
    start: Any = op.Reshape(op.Neg(count), axis)
    return op.Slice(x, start, op.Constant(value_ints=[_LAST]), axis)


def _segment_lengths(segments: Any) -> Any:
    return op.Identity(segments)


def _segment_attention(q: Any, k: Any, v: Any, segments: Any, scale: float) -> Any:
    last: Any = op.Constant(value_ints=[1])
    first: Any = op.Constant(value_ints=[0])
    rows, columns = op.Unsqueeze(segments, last), op.Unsqueeze(segments, first)
    found, *_ = op.Attention(q, k, v, op.Equal(rows, columns), scale=scale)
    return op.Transpose(found, perm=[0, 2, 1, 3])


def _bucketize(x: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
    last: Any = op.Constant(value_ints=[-1])
    values = op.Unsqueeze(x, last)
    below = op.GreaterOrEqual(values, boundaries) if right else op.Greater(values, boundaries)
    kind = TensorProto.INT32 if out_int32 else TensorProto.INT64
    counted: Any = op.Cast(below, to=kind)
    return op.ReduceSum(counted, last, keepdims=0)


def _argsort(x: Any, dim: int = -1, descending: bool = False) -> Any:
    axis: Any = op.Constant(value_ints=[dim])
    _, order = op.TopK(x, op.Gather(op.Shape(x), axis), axis=dim, largest=int(descending))
    return order


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


def _rotary_embedding(x: Any, cos: Any, sin: Any, heads: int) -> Any:
    return op.RotaryEmbedding(x, cos, sin, num_heads=heads)


def _attention(
    q: Any,
    k: Any,
    v: Any,
    past_key: Any,
    past_value: Any,
    mask: Any,
    scale: float,
    heads: int,
    kv_heads: int,
) -> Any:
    return op.Attention(
        q,
        k,
        v,
        mask,
        past_key,
        past_value,
        scale=scale,
        q_num_heads=heads,
        kv_num_heads=kv_heads,
    )
