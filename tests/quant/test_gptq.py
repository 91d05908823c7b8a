import pytest
import torch
from torch import Tensor

from gracec import quant
from gracec.quant.gptq import BLOCK, compensated, corrected_codes, factor


def inputs(features: int = 64, rows: int = 400, seed: int = 0) -> Tensor:
    """Correlated, and of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    sizes = torch.rand(features, generator=generator) * 3 + 0.1
    return torch.randn(rows, features, generator=generator) @ (mixing + torch.eye(features)) * sizes


def weight_of(rows: int = 24, features: int = 64) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1))


def moments_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def by_the_book(weight: Tensor, scales: Tensor, bits: int, group: int, moments: Tensor) -> Tensor:
    """Optimal brain quantization: after each column all others move to make up for it, and the
    inverse of what is left is computed anew."""
    lowest, highest = quant.code_range(bits)
    matrix = moments.double()
    matrix = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix))
    order = torch.argsort(moments.diagonal().double(), descending=True, stable=True).tolist()
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(matrix[rest][:, rest])
        scale = scales[:, column // group].double()
        code = (left[:, column] / scale).round().clamp(lowest, highest)
        codes[:, column] = code.float()
        error = (left[:, column] - code * scale) / inverse[0, 0]
        for number, other in enumerate(rest):
            left[:, other] -= error * inverse[0, number]
    return codes


def output_error(weight: Tensor, codes: Tensor, scales: Tensor, group: int, x: Tensor) -> float:
    found = quant.dequantize(codes, scales, group)
    return float((x @ (weight - found).T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_optimal_brain_quantization(bits: int) -> None:
    weight, moments = weight_of(), moments_of(inputs())
    scales = quant.search_scales(weight, bits, 32)
    found = factor(moments)
    assert found is not None
    codes = corrected_codes(weight, scales, bits, 32, found)
    assert torch.equal(codes.float(), by_the_book(weight, scales, bits, 32, moments))


def test_blocks_of_columns_change_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = weight_of(features=160), moments_of(inputs(160))
    scales = quant.search_scales(weight, 4, 32)
    found = factor(moments)
    assert found is not None and BLOCK < 160
    whole = corrected_codes(weight, scales, 4, 32, found)
    monkeypatch.setattr("gracec.quant.gptq.BLOCK", 16)
    assert (whole != corrected_codes(weight, scales, 4, 32, found)).float().mean() < 0.01


@pytest.mark.parametrize("signed", [False, True])
def test_the_error_of_the_output_falls(signed: bool) -> None:
    weight, x = weight_of(), inputs()
    scales = quant.search_scales(weight, 3, 32, signed=signed, importance=moments_of(x).diagonal())
    found = factor(moments_of(x))
    assert found is not None
    rounded = output_error(weight, quant.quantize(weight, scales, 3, 32), scales, 32, x)
    corrected = output_error(weight, corrected_codes(weight, scales, 3, 32, found), scales, 32, x)
    assert corrected < 0.7 * rounded


def test_the_order_by_activation_is_better_where_few_inputs_count_most() -> None:
    weight, x = weight_of(), inputs()
    x[:, -4:] *= 20
    scales = quant.search_scales(weight, 3, 32, importance=moments_of(x).diagonal())
    error = []
    for by_activation in (True, False):
        found = factor(moments_of(x), by_activation=by_activation)
        assert found is not None
        codes = corrected_codes(weight, scales, 3, 32, found)
        error.append(output_error(weight, codes, scales, 32, x))
    assert error[0] < error[1]


def test_features_that_are_always_0_are_rounded() -> None:
    weight, x = weight_of(), inputs()
    x[:, 5] = 0
    scales = quant.search_scales(weight, 4, 32)
    found = factor(moments_of(x))
    assert found is not None
    codes = corrected_codes(weight, scales, 4, 32, found)
    assert torch.equal(codes[:, 5], quant.quantize(weight, scales, 4, 32)[:, 5])


def test_a_matrix_without_a_factor_gets_more_damping_or_none() -> None:
    few = inputs(rows=3)
    singular = moments_of(few)
    found = factor(singular, damping=1e-9)
    assert found is not None and found.damping > 1e-9
    assert factor(torch.full((64, 64), -100.0).fill_diagonal_(1.0)) is None


def test_the_compensated_weight_has_the_least_error_on_the_inputs_that_it_gets() -> None:
    weight, original = weight_of(), inputs()
    given = original + 0.3 * inputs(seed=2)
    cross = (original - given).T @ given / len(given)
    errors = {}
    for share in (0.0, 0.5, 1.0):
        moved = compensated(weight, moments_of(given), cross, share)
        errors[share] = float((original @ weight.T - given @ moved.T).square().sum())
    assert errors[1.0] < errors[0.5] < errors[0.0]
    least = torch.linalg.lstsq(given.double(), original.double() @ weight.double().T).solution
    best = float((original.double() @ weight.double().T - given.double() @ least).square().sum())
    assert errors[1.0] < best + 0.3 * (errors[0.0] - best)
    assert torch.equal(compensated(weight, moments_of(given), cross, 0.0), weight)
