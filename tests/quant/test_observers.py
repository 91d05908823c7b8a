import pytest
import torch

from gracec import quant
from gracec.errors import GracecError
from gracec.quant import QuantSpec, observers
from gracec.quant.observers import OBSERVERS, ActivationSpec, grid_of_range, weight_scales


def outliers(seed: int = 0) -> torch.Tensor:
    """[4, 50, 64]: normal values, a few of them 30 times as large, shifted to the right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 50, 64, generator=generator) + 0.5
    return torch.where(torch.rand(x.shape, generator=generator) < 0.0005, x * 30, x)


def calibrated(spec: ActivationSpec, *batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    observer = OBSERVERS[spec.observer](spec, batches[0].shape[-1])
    for batch in batches:
        assert observer(batch) is batch
    return observer.scales_and_zero_points()


def squared_error(spec: ActivationSpec, x: torch.Tensor) -> float:
    scales, zeros = calibrated(spec, x)
    restored = quant.quantize_dequantize_activation(x, scales, zeros, spec.bits)
    return float((restored - x).square().mean())


def test_mse_is_the_best_on_outliers() -> None:
    errors = {
        name: squared_error(ActivationSpec(bits=4, observer=name, percentile=99.9), outliers())
        for name in OBSERVERS
    }
    assert min(errors, key=errors.__getitem__) == "mse"
    assert errors["mse"] < 0.9 * errors["min_max"]


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("granularity", "groups"), [("per_tensor", 1), ("per_channel", 64), ("per_group", 4)]
)
def test_every_observer_at_every_granularity(
    observer: str, symmetric: bool, granularity: str, groups: int
) -> None:
    spec = ActivationSpec(8, granularity, 16, observer, symmetric=symmetric)
    scales, zeros = calibrated(spec, outliers(0), outliers(1))
    assert scales.shape == zeros.shape == (groups,)
    assert zeros.dtype == torch.int32
    assert torch.equal(quant.round_scale(scales, "bf16"), scales)
    assert symmetric == (zeros.count_nonzero() == 0)
    x = outliers(2)
    restored = quant.quantize_dequantize_activation(x, scales, zeros, 8)
    assert (restored - x).abs().median() < 0.25


def test_min_max_covers_all_batches_and_moving_average_forgets() -> None:
    batches = [torch.full((1, 2, 4), value) for value in (1.0, 8.0, 2.0)]
    low = [torch.zeros(1, 2, 4), *batches]
    spec = ActivationSpec(8, observer="min_max", symmetric=True)
    scales, _ = calibrated(spec, *low)
    assert scales.item() == pytest.approx(8 / 127, rel=1e-2)
    spec = ActivationSpec(8, observer="moving_average", symmetric=True)
    scales, _ = calibrated(spec, *low)
    expected = ((0.0 * 0.9 + 0.1) * 0.9 + 0.8) * 0.9 + 0.2
    assert scales.item() == pytest.approx(expected / 127, rel=1e-2)


def test_percentile_leaves_the_tails_out() -> None:
    x = torch.arange(10001.0).reshape(1, -1, 1)
    scales, zeros = calibrated(ActivationSpec(8, observer="percentile", percentile=90.0), x)
    assert scales.item() == pytest.approx(9500 / 255, rel=1e-2)
    assert zeros.item() == -128


def test_groups_have_scales_of_their_own() -> None:
    x = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    x[..., 4:] *= 100
    scales, _ = calibrated(ActivationSpec(8, "per_group", 4, "min_max", symmetric=True), x)
    assert scales[1] > 50 * scales[0]


def test_zero_is_on_the_grid() -> None:
    scales, zeros = grid_of_range(torch.tensor([2.0]), torch.tensor([5.0]), 8, symmetric=False)
    x = torch.zeros(1, 1)
    assert quant.quantize_dequantize_activation(x, scales, zeros, 8).item() == 0.0


def test_refusals() -> None:
    with pytest.raises(GracecError, match="unknown observer 'max'"):
        ActivationSpec(observer="max")
    with pytest.raises(GracecError, match="unknown granularity"):
        ActivationSpec(granularity="per_row")
    with pytest.raises(GracecError, match="group_size 48 does not divide the 64 features"):
        calibrated(ActivationSpec(granularity="per_group", group_size=48), outliers())
    with pytest.raises(GracecError, match="nothing was observed; give calibration data"):
        OBSERVERS["mse"](ActivationSpec(), 8).scales_and_zero_points()


@pytest.mark.parametrize("observer", ["mse", "min_max", "percentile"])
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("per_group", (16, 4)), ("per_channel", (16, 1)), ("per_tensor", (1, 1))],
)
def test_weight_scales(observer: str, granularity: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(8, 32, granularity=granularity)
    scales = weight_scales(weight, spec, observer)
    assert tuple(scales.shape) == spec.scale_shape(16, 128) == shape
    group = spec.group_of(128)
    codes = quant.quantize(weight, scales, 8, group)
    assert (quant.dequantize(codes, scales, group) - weight).abs().median() < 0.01
    broken = weight.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(GracecError, match="NaN or infinity"):
        weight_scales(broken, spec, observer)


def test_coarser_weight_scales_are_worse() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    weight *= torch.logspace(-1, 1, 32).unsqueeze(1)
    ratios = []
    for granularity in ("per_group", "per_channel", "per_tensor"):
        spec = QuantSpec(4, 32, granularity=granularity)
        scales, group = weight_scales(weight, spec), spec.group_of(256)
        restored = quant.dequantize(quant.quantize(weight, scales, 4, group), scales, group)
        ratios.append(quant.signal_to_noise_db(weight, restored))
    assert ratios == sorted(ratios, reverse=True)


def test_a_sample_is_bounded_and_sees_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "SAMPLE_VALUES", 1 << 10)
    spec = ActivationSpec(observer="percentile", percentile=100)
    seen = [OBSERVERS["percentile"](spec, 256) for _ in range(2)]
    x = torch.arange(256.0).expand(64, 256)
    for observer in seen:
        for _ in range(4):
            observer(x)
    assert seen[0].sample.shape[1] <= 1 << 10
    assert len(seen[0].sample.unique()) > 200
    assert torch.equal(seen[0].sample, seen[1].sample)
