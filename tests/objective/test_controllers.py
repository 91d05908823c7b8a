import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracec.errors import GracecError
from gracec.objective import (
    Controller,
    DualAscentController,
    EpochLagrangianController,
    FixedController,
    code_entropy,
)

PUBLISHED = [
    {"tau": 0.35, "eta": 0.0015, "beta_init": 1.0, "beta_min": 0.1, "beta_max": 5.0},
    {"tau": 3.0, "eta": 0.003, "beta_init": 0.5, "beta_min": 0.1, "beta_max": 1.0},
]


def trajectory(steps: int, shape: str) -> list[float]:
    """L_GDKD from 36 to 2, at a constant rate or early in the run."""
    if shape == "steady":
        return [36 * (2 / 36) ** (k / (steps - 1)) for k in range(steps)]
    return [2 + 34 * math.exp(-5 * k / steps) for k in range(steps)]


def test_dual_ascent_by_hand() -> None:
    controller = DualAscentController(2.0, 0.1, 0.5, 0.0, 1.0, ema_decay=0.5)
    assert controller.update(4.0) == pytest.approx(0.5 + 0.1 * (4 - 2))
    assert controller.update(1.0) == pytest.approx(0.7 + 0.1 * (2.5 - 2))
    assert controller.ema == 2.5
    assert controller.update(torch.tensor(8.5)) == 1.0
    assert controller.saturated
    assert controller.update(0.0) == 1.0
    assert controller.ema == 2.75
    assert controller.update(0.0) == pytest.approx(1 + 0.1 * (1.375 - 2))
    assert not controller.saturated


def test_defaults_are_the_second_published_set() -> None:
    default, second = DualAscentController(), DualAscentController(**PUBLISHED[1])  # type: ignore[arg-type]
    losses = [3.0, 2.5, 3.9, 3.1]
    assert [default.update(x) for x in losses] == [second.update(x) for x in losses]
    assert default.ema_decay == 0.99


@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=60),
    tau=st.sampled_from([0.35, 3.0, "auto"]),
)
def test_beta_stays_in_its_bounds_and_saturation_says_when_it_is_stopped(
    losses: list[float], tau: float
) -> None:
    controller = DualAscentController(tau, 0.01, 0.5, 0.1, 1.0, steps=len(losses))
    for loss in losses:
        beta = controller.update(loss)
        assert 0.1 <= beta <= 1.0
        if controller.saturated:
            assert beta in (0.1, 1.0)


@pytest.mark.parametrize("tau", [0.8, 1.0, 1.3])
def test_it_settles_where_the_smoothed_loss_is_tau(tau: float) -> None:
    """A plant whose loss falls with β: 1 / (0.5 + β), between 2/3 and 1.7 inside the bounds."""
    controller = DualAscentController(tau, 0.003, 0.5, 0.1, 1.0)
    for _ in range(6000):
        controller.update(1 / (0.5 + controller.beta))
    assert controller.ema == pytest.approx(tau, rel=1e-3)
    assert controller.beta == pytest.approx(1 / tau - 0.5, abs=1e-3)
    assert not controller.saturated


@pytest.mark.parametrize("options", PUBLISHED)
@pytest.mark.parametrize("shape", ["steady", "early"])
def test_published_values_saturate_on_the_published_trajectory(
    options: dict[str, float], shape: str
) -> None:
    controller = DualAscentController(**options)  # type: ignore[arg-type]
    betas = [controller.update(loss) for loss in trajectory(1000, shape)[:100]]
    assert betas[-1] == options["beta_max"]
    assert controller.saturated
    if options["tau"] == 3.0:
        assert betas.index(options["beta_max"]) < 40


@pytest.mark.parametrize("steps", [30, 200, 1000, 5000])
@pytest.mark.parametrize("shape", ["steady", "early"])
@pytest.mark.parametrize("unit", [1.0, 0.01])
@pytest.mark.parametrize("bounds", [(0.5, 0.1, 1.0), (1.0, 0.1, 5.0)])
def test_auto_does_not_saturate_on_the_published_trajectory(
    steps: int, shape: str, unit: float, bounds: tuple[float, float, float]
) -> None:
    beta_init, beta_min, beta_max = bounds
    controller = DualAscentController(
        "auto", beta_init=beta_init, beta_min=beta_min, beta_max=beta_max, steps=steps
    )
    betas = []
    for loss in trajectory(steps, shape):
        betas.append(controller.update(unit * loss))
        assert not controller.saturated
    assert max(betas) > beta_init * 1.05
    if steps >= 1000:
        assert betas[-1] < max(betas) * 0.95


def test_auto_puts_tau_at_the_geometric_middle_of_the_fall() -> None:
    controller = DualAscentController("auto", steps=1000)
    assert {controller.update(loss) for loss in [30.0, 42.0] * 10} == {0.5}
    assert controller.ema == pytest.approx(36)
    assert controller.tau == pytest.approx(math.sqrt(36 * 2))
    assert controller.update(36.0) == pytest.approx(0.5 + 0.9 / 2000)


def test_auto_moves_a_plant_to_tau() -> None:
    """A loss that starts at 9 and settles at 2.5 exp(-6 (β - 0.5)): at 2.5 if β stayed."""
    controller = DualAscentController("auto", steps=3000)
    loss = 9.0
    for _ in range(3000):
        loss += 0.02 * (2.5 * math.exp(-6 * (controller.beta - 0.5)) - loss)
        controller.update(loss)
    assert controller.tau is not None
    assert controller.tau < 2
    assert loss == pytest.approx(controller.tau, rel=0.02)
    assert not controller.saturated


def test_a_loss_of_zero_is_no_error() -> None:
    controller = DualAscentController("auto", steps=30)
    for _ in range(30):
        controller.update(0.0)
    assert 0.1 <= controller.beta <= 1.0


def test_epochs_by_hand() -> None:
    controller = EpochLagrangianController(beta_cap=2.0, eta=0.1)
    assert [controller.update(x) for x in (5.0, 3.0, 1.0)] == [0.0, 0.0, 0.0]
    assert controller.end_epoch(0.5) == pytest.approx(0.1 * (3 - 2 * 0.5))
    assert controller.update(4.0) == controller.beta
    assert controller.end_epoch(1.0) == pytest.approx(0.2 + 0.1 * (4 - 2))
    controller.update(0.0)
    assert not controller.saturated
    for _ in range(4):
        controller.update(0.0)
        controller.end_epoch(1.0)
    assert controller.beta == 0.0
    assert controller.saturated


def test_a_fixed_beta_stays() -> None:
    controller = FixedController(0.7)
    assert [controller.update(x) for x in (36.0, 2.0)] == [0.7, 0.7]
    assert controller.end_epoch(0.5) == 0.7
    assert not controller.saturated


def auto() -> Controller:
    return DualAscentController("auto", steps=100)


MAKERS: list[Callable[[], Controller]] = [
    FixedController,
    DualAscentController,
    auto,
    EpochLagrangianController,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("stop", [1, 5, 37])
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(
    make: Callable[[], Controller], stop: int
) -> None:
    losses = [5 + 3 * math.sin(k) for k in range(60)]

    def step(controller: Controller, k: int) -> float:
        controller.update(losses[k])
        return controller.end_epoch(0.83) if k % 10 == 9 else controller.beta

    whole, first, second = make(), make(), make()
    expected = [step(whole, k) for k in range(60)]
    before = [step(first, k) for k in range(stop)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [step(second, k) for k in range(stop, 60)] == expected
    assert second.state_dict() == whole.state_dict()


def test_the_state_of_another_controller_is_refused() -> None:
    state = FixedController().state_dict()
    with pytest.raises(GracecError, match="DualAscentController keeps .* the state has"):
        DualAscentController().load_state_dict(state)


@pytest.mark.parametrize("controller", [DualAscentController(), EpochLagrangianController()])
@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_is_refused(
    controller: Controller, loss: float | torch.Tensor
) -> None:
    with pytest.raises(GracecError, match="the distillation loss of this step is"):
        controller.update(loss)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DualAscentController(beta_init=2.0), "beta_init 2.0 and its bounds"),
        (lambda: DualAscentController(beta_min=0.5, beta_max=0.5), "beta_min < beta_max"),
        (lambda: DualAscentController(ema_decay=1.0), "ema_decay is 1.0"),
        (lambda: DualAscentController(eta=0.0), "eta is 0.0"),
        (lambda: DualAscentController("auto", steps=0), "steps is 0"),
        (lambda: DualAscentController("middle"), "tau is 'middle'"),  # type: ignore[arg-type]
        (lambda: EpochLagrangianController(eta=0.001), "eta is 0.001"),
        (lambda: EpochLagrangianController(beta_cap=-1.0), "beta_cap is -1.0"),
        (lambda: EpochLagrangianController().end_epoch(0.5), "without an optimizer step"),
        (lambda: EpochLagrangianController().end_epoch(1.5), "the capacity is 1.5"),
        (lambda: FixedController(-1.0), "beta is -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(GracecError, match=reason):
        make()


def test_entropy_of_codes() -> None:
    every = torch.arange(-8, 8, dtype=torch.int8)
    assert code_entropy(every, 4) == pytest.approx(1)
    assert code_entropy(every // 2, 4) == pytest.approx(3 / 4)
    assert code_entropy(torch.zeros(5, 5, dtype=torch.int8), 4) == 0
    assert code_entropy(torch.arange(-128, 128).to(torch.int8), 8) == pytest.approx(1)
    quarter = torch.tensor([0, 0, 0, 1], dtype=torch.int8)
    assert code_entropy(quarter, 2) == pytest.approx((2 - 0.75 * math.log2(3)) / 2)


def test_codes_of_several_weights_are_counted_together() -> None:
    parts = [torch.zeros(3, 1, dtype=torch.int8), torch.ones(3, dtype=torch.int8)]
    assert code_entropy(iter(parts), 4) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (torch.tensor([8], dtype=torch.int8), "out of the range of 4 bits"),
        (torch.tensor([-9], dtype=torch.int8), "out of the range of 4 bits"),
        ([], "there are no codes"),
    ],
)
def test_codes_that_cannot_be_are_refused(
    codes: torch.Tensor | list[torch.Tensor], reason: str
) -> None:
    with pytest.raises(GracecError, match=reason):
        code_entropy(codes, 4)
