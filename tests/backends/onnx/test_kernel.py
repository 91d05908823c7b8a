import pytest
import torch

from gracec.backends.onnx import kernel
from gracec.passes.freeze import FrozenWeight
from gracec.quant import QuantSpec
from tests.backends.artifacts import random_weight


@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits, 32) for bits in (2, 3, 4, 8)),
        *(QuantSpec(4, size) for size in (16, 64, 128)),
        QuantSpec(4, granularity="per_channel"),
        QuantSpec(8, granularity="per_tensor"),
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


def test_narrow_weights_take_two_bits() -> None:
    weight = FrozenWeight.from_codes(
        torch.tensor([[-2, -1, 0, 1] * 4], dtype=torch.int8), torch.ones(1, 1), QuantSpec(2, 16)
    )
    codes, _ = kernel.matmulnbits_operands(weight)
    assert codes.flatten().tolist() == [0b11100100] * 4
