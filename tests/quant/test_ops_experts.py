import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gracec.kernels.onnxruntime import matmulnbits_operands
from gracec.quant import Experts, FrozenWeight, QuantSpec
from gracec.quant.frozen import by_matrix, code_hash
from gracec.quant.ops_experts import expert_linear
from gracec.quant.ops_onnx import expert_matmul, expert_matmul_nbits

EXPERTS = torch.tensor([2, 0, 2, 2, 0])
"""The second of three is not asked."""


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator, dtype=dtype)
    return x, torch.randn(3, 4, 8, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_multiplied_by_its_expert(dtype: torch.dtype) -> None:
    x, weight = operands(dtype)
    found = expert_linear(x, weight, EXPERTS, 3)
    assert found.shape == (5, 4) and found.dtype == dtype
    for expert in (0, 2):
        rows = expert == EXPERTS
        assert torch.equal(found[rows], functional.linear(x[rows], weight[expert]))
    assert torch.equal(found, expert_linear(x, weight.reshape(12, 8), EXPERTS, 3))


def test_no_row_at_all() -> None:
    x, weight = operands()
    assert expert_linear(x[:0], weight, EXPERTS[:0], 3).shape == (0, 4)


@pytest.mark.parametrize("matrix", [False, True])
def test_gradients(matrix: bool) -> None:
    x, weight = (tensor.requires_grad_() for tensor in operands(torch.float64))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.reshape(12, 8) if matrix else weight
        found: Tensor = expert_linear(x, weight, EXPERTS, 3)
        return found

    assert torch.autograd.gradcheck(run, (x, weight))
    run(x, weight).sum().backward()
    assert weight.grad is not None and not weight.grad[1].any(), "nothing was asked of it"


def test_what_onnx_runs_computes_the_same() -> None:
    x, _ = operands()
    codes = torch.randint(-8, 8, (12, 32), dtype=torch.int8)
    scales = torch.rand(12, 2) + 0.5
    frozen = FrozenWeight.from_codes(codes, scales, QuantSpec(4, 16), Experts(3))
    x = torch.cat([x] * 4, dim=1)
    expected = expert_linear(x, frozen.dequantize(), EXPERTS, 3)
    matrices = [one.dequantize().t().contiguous() for one in frozen.matrices()]
    torch.testing.assert_close(expert_matmul(x, EXPERTS, matrices), expected)
    packed = [matmulnbits_operands(one) for one in frozen.matrices()]
    kinds = [list(kind) for kind in zip(*packed, strict=True)]
    arguments = (x, EXPERTS, *kinds, 4, 16, 1)
    torch.testing.assert_close(expert_matmul_nbits(*arguments), expected)
    torch.library.opcheck(torch.ops.gracec.expert_matmul.default, (x, EXPERTS, matrices))
    torch.library.opcheck(torch.ops.gracec.expert_matmul_nbits.default, arguments)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    x, weight = operands()
    arguments = (x.requires_grad_(), weight.requires_grad_(), EXPERTS, 3)
    torch.library.opcheck(torch.ops.gracec.expert_linear.default, arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weights_of_experts_are_one_matrix(transposed: bool) -> None:
    experts = Experts(3, transposed)
    weight = operands()[1]
    held = weight.transpose(1, 2).contiguous() if transposed else weight
    matrix = experts.matrix(held)
    assert torch.equal(matrix, weight.reshape(12, 8))
    assert torch.equal(experts.held(matrix), held)
    codes = torch.randint(-8, 8, (12, 16), dtype=torch.int8)
    frozen = FrozenWeight.from_codes(codes, torch.rand(12, 1) + 0.5, QuantSpec(4, 16), experts)
    assert frozen.held_shape == ((3, 16, 4) if transposed else (3, 4, 16))
    assert frozen.matrix_shape == (4, 16)
    assert torch.equal(experts.matrix(frozen.dequantize()), codes * frozen.scales)
    for number, (name, one) in enumerate(by_matrix("w", frozen).items()):
        assert name == f"w.{number}"
        assert torch.equal(one.codes, codes[4 * number : 4 * number + 4])
    alone = FrozenWeight.from_codes(codes, frozen.scales, frozen.spec)
    assert code_hash(frozen) != code_hash(alone)
    planned = FrozenWeight.planned((12, 16), frozen.spec, experts=experts)
    assert planned.held_shape == frozen.held_shape and len(planned.matrices()) == 3


def test_one_scale_of_the_whole_weight_is_that_of_each_expert() -> None:
    codes = torch.randint(-8, 8, (12, 16), dtype=torch.int8)
    spec = QuantSpec(4, granularity="per_tensor")
    frozen = FrozenWeight.from_codes(codes, torch.full((1, 1), 0.5), spec, Experts(3))
    assert torch.equal(
        torch.cat([one.dequantize() for one in frozen.matrices()]), codes * torch.tensor(0.5)
    )
