import pytest
import torch
from torch import Tensor

from gracec import quant
from gracec.quant import search_scales

FACTORS = torch.linspace(0.3, 1.2, 16)


def weight_and_inputs() -> tuple[Tensor, Tensor]:
    """A weight [6, 64], and inputs [200, 64] that are correlated and of several sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=generator)
    mixing = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    sizes = torch.rand(64, generator=generator) * 4
    return weight, torch.randn(200, 64, generator=generator) @ mixing * sizes


def tried(w: Tensor, bits: int, signed: bool) -> list[Tensor]:
    """Every candidate for a group, one after the other."""
    lowest, highest = quant.code_range(bits)
    largest = w.abs().max()
    scales = [quant.round_scale(f * (largest / highest), "bf16") for f in FACTORS]
    if signed:
        scales.append(quant.round_scale(largest / -lowest, "bf16"))
        scales += [-scale for scale in scales]
    return scales


def errors(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    lowest, highest = quant.code_range(bits)
    return (w / scale).round().clamp(lowest, highest) * scale - w


def cost(w: Tensor, scale: Tensor, bits: int, matrix: Tensor) -> float:
    error = errors(w, scale, bits).double()
    return float(error @ matrix.double() @ error)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "importance", "blocks"])
def test_it_is_the_best_candidate_of_a_plain_loop(bits: int, signed: bool, kind: str) -> None:
    weight, inputs = weight_and_inputs()
    moments = inputs.T @ inputs / len(inputs)
    blocks = torch.stack([moments[:32, :32], moments[32:, 32:]])
    given = {"importance": moments.diagonal()} if kind == "importance" else {}
    given = {"blocks": blocks} if kind == "blocks" else given
    found = search_scales(weight, bits, 32, candidates=16, signed=signed, **given)
    for row in range(6):
        for group in range(2):
            columns = slice(group * 32, (group + 1) * 32)
            w = weight[row, columns]
            matrix = {
                "plain": torch.eye(32),
                "importance": moments.diagonal()[columns].diag(),
                "blocks": blocks[group],
            }[kind]

            best = min(cost(w, scale, bits, matrix) for scale in tried(w, bits, signed))
            assert cost(w, found[row, group], bits, matrix) == pytest.approx(best, rel=1e-4)


def test_a_negative_scale_lets_the_larger_side_reach_the_lowest_code() -> None:
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 1.0, -0.4
    unsigned = search_scales(w, 2, 32)
    signed = search_scales(w, 2, 32, signed=True)
    assert unsigned.item() > 0 > signed.item()
    assert errors(w[0], signed[0], 2).square().sum() < errors(w[0], unsigned[0], 2).square().sum()


def test_features_without_importance_do_not_decide() -> None:
    weight, _ = weight_and_inputs()
    weight[:, 0] = 50.0  # an outlier that nothing reads
    importance = torch.ones(64)
    importance[0] = 0.0
    rest = weight.clone()
    rest[:, 0] = 0.0
    error = {}
    for name, given in (("plain", None), ("weighed", importance)):
        scales = search_scales(weight, 4, 32, lowest=0.01, importance=given)
        error[name] = (quant.fake_quantize(rest, scales, 4, 32) - rest).square().sum()
    assert error["weighed"] < 0.2 * error["plain"]
