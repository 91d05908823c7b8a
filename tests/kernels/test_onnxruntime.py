import dataclasses

import pytest
import torch

from gracec.kernels import onnxruntime as kernel
from gracec.quant import QuantSpec
from gracec.quant.frozen import FrozenActivation, FrozenWeight
from gracec.quant.observers import ActivationSpec
from tests.backends.artifacts import random_weight


@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits, 32) for bits in (2, 3, 4, 8)),
        *(QuantSpec(4, size) for size in (16, 64, 128)),
        QuantSpec(4, granularity="per_channel"),
        QuantSpec(8, granularity="per_tensor"),
        *(QuantSpec(bits, 32, signed=True) for bits in (2, 3, 4, 8)),
        QuantSpec(4, granularity="per_channel", signed=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [6, 7])
def test_operands_are_codes_times_scales(spec: QuantSpec, rows: int) -> None:
    weight = random_weight((rows, 384), spec, 0)
    block = kernel.block_size(weight)
    codes, scales = kernel.qdq_operands(weight)
    found = torch.ops.gracec.dequantize_linear(codes, scales, block)
    assert torch.equal(found.t(), weight.dequantize())
    codes, scales = kernel.matmulnbits_operands(weight)
    bits = kernel.kernel_bits(weight, "matmulnbits")
    identity = torch.eye(384)
    product = torch.ops.gracec.matmul_nbits(identity, codes, scales, bits, block, 1)
    assert torch.equal(product.t(), weight.dequantize())


def test_what_a_code_takes() -> None:
    def bits(width: int, rows: int = 8) -> list[int]:
        weight = random_weight((rows, 32), QuantSpec(width, 32), 0)
        return [kernel.kernel_bits(weight, ops) for ops in kernel.OPS]

    assert [bits(width) for width in (2, 3, 4, 8)] == [[4, 2], [4, 4], [4, 4], [8, 8]]
    assert bits(4, rows=7) == [8, 4]


def test_blocks() -> None:
    def block(columns: int) -> int:
        spec = QuantSpec(4, granularity="per_channel")
        return kernel.block_size(random_weight((8, columns), spec, 0))

    assert [block(columns) for columns in (512, 384, 48, 24)] == [256, 128, 16, 0]


@pytest.mark.parametrize(
    ("columns", "bits", "act", "reason"),
    [
        (32, 4, None, ""),
        (24, 4, None, "the kernel takes blocks of 16, a scale has 24 features"),
        (24, 8, None, "the kernel takes blocks of 16, a scale has 24 features"),
        (24, 8, ActivationSpec(), ""),
        (
            32,
            4,
            ActivationSpec(bits=4),
            "the kernels take inputs in int8/tensor, its input is in int4/tensor",
        ),
        (
            32,
            4,
            ActivationSpec(granularity="per_channel"),
            "the kernels take inputs in int8/tensor, its input is in int8/channel",
        ),
    ],
)
def test_refusals(columns: int, bits: int, act: ActivationSpec | None, reason: str) -> None:
    weight = random_weight((8, columns), QuantSpec(bits, granularity="per_channel"), 0)
    if act is not None:
        grid = FrozenActivation(torch.ones(1), torch.zeros(1, dtype=torch.int32), act)
        weight = dataclasses.replace(weight, activation=grid)
    assert kernel.refusal(weight) == reason


@pytest.mark.parametrize(
    ("width", "scales", "reason"),
    [
        (36, 1, ""),
        (32, 2, ""),
        (36, 3, "a scale has 12 features, which is neither a filter nor a block"),
    ],
)
def test_refusals_of_filters(width: int, scales: int, reason: str) -> None:
    weight = random_weight((8, width), QuantSpec(4, granularity="per_channel"), 0)
    weight = dataclasses.replace(weight, scales=weight.scales.repeat(1, scales))
    assert kernel.filter_refusal(weight) == reason


def test_narrow_weights_take_two_bits() -> None:
    weight = FrozenWeight.from_codes(
        torch.tensor([[-2, -1, 0, 1] * 4], dtype=torch.int8), torch.ones(1, 1), QuantSpec(2, 16)
    )
    codes, _ = kernel.matmulnbits_operands(weight)
    assert codes.flatten().tolist() == [0b11100100] * 4
