"""Controllers of β, the weight of distillation, which change it as training goes on.

An information bottleneck fits the teacher under a limited rate; β is the price of a bad fit
(arXiv 2601.22709). Two rules are published for it:

    DualAscentController         EMA <- d · EMA + (1 - d) · L_GDKD          every optimizer step
                                 β   <- clip(β + η (EMA - τ), [β_min, β_max])
    EpochLagrangianController    λ   <- max(0, λ + η (L_fidelity - β_cap · L_capacity))
                                                                            every epoch
`FixedController` is the control for both. Controllers compute with Python floats, so that a state
that was written as JSON resumes bit for bit. Given the loss of the whole optimizer step, β is the
same on every rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gracec.errors import GracecError

State = dict[str, float | None]
"""What changes in a controller: JSON-able."""

FALL = 36 / 2
"""By what factor L_GDKD falls in the published runs; `tau="auto"` aims at its square root."""
AUTO_WINDOW = 20
"""Optimizer steps, at most, from which `tau="auto"` takes the level that a run starts at."""


class Controller(ABC):
    """A rule for β.

    Attributes:
        beta: the weight of the distillation term in the next optimizer step.
        saturated: whether a bound stopped the last change of β: then it no longer adapts.
    """

    beta: float
    saturated: bool = False
    _state: ClassVar[tuple[str, ...]] = ("beta", "saturated")

    @abstractmethod
    def update(self, gdkd: float | Tensor) -> float:
        """Take in L_GDKD of one optimizer step, over all its micro-batches and ranks; return β.

        Raises:
            GracecError: if the loss is not finite.
        """

    def end_epoch(self, capacity: float) -> float:
        """Take in the capacity of the codes (`code_entropy`) after an epoch; return β."""
        return self.beta

    def state_dict(self) -> State:
        """Everything that changes. Options are not in it."""
        return {name: getattr(self, name) for name in self._state}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state.

        Raises:
            GracecError: if another kind of controller wrote it.
        """
        if set(state) != set(self._state):
            raise GracecError(
                f"{type(self).__name__} keeps {', '.join(self._state)}; the state has "
                f"{', '.join(state)}",
                fix="resume with the controller that wrote it",
            )
        for name, value in state.items():
            setattr(self, name, value)


class FixedController(Controller):
    """β stays what it is: the control that switches adaptation off."""

    def __init__(self, beta: float = 1.0) -> None:
        if not (beta >= 0 and math.isfinite(beta)):
            raise GracecError(f"beta is {beta}", fix="use a number that is not negative")
        self.beta = beta

    def update(self, gdkd: float | Tensor) -> float:
        return self.beta


class DualAscentController(Controller):
    """β rises while the smoothed loss is above τ and falls while it is below.

        EMA <- d · EMA + (1 - d) · L_GDKD            the first loss starts the average
        β   <- clip(β + η (EMA - τ), [β_min, β_max])

    Both published sets of values saturate: with L_GDKD far above τ, β runs into β_max within a few
    steps and stays there. `tau="auto"` finds τ and η in the run instead:

        τ = L_0 / √18      L_0 = mean loss of the first steps, in which β stays
        β <- clip(β + η' · clip(ln(EMA / τ), [-1, 1]), [β_min, β_max])
        η' = (β_max - β_min) / (2 · steps)

    In the published runs L_GDKD falls from about 36 to about 2, so L_0 / √18 is the geometric
    middle of such a fall. The logarithm makes the rule independent of the unit of the loss, and η'
    lets a whole run at full error move β by half of its range. On such a fall β does not saturate.

    Args:
        tau: target of the smoothed loss, in nats; or "auto".
        eta: change of β for each nat above τ; not used by "auto".
        beta_init: β of the first step.
        beta_min: lower bound of β.
        beta_max: upper bound of β.
        ema_decay: d, in [0, 1).
        steps: optimizer steps of the run; used by "auto" only.

    Raises:
        GracecError: if a value is out of its range.
    """

    _state = ("beta", "saturated", "seen", "ema", "tau")

    def __init__(
        self,
        tau: float | Literal["auto"] = 3.0,
        eta: float = 0.003,
        beta_init: float = 0.5,
        beta_min: float = 0.1,
        beta_max: float = 1.0,
        ema_decay: float = 0.99,
        steps: int = 1000,
    ) -> None:
        if not 0 <= beta_min <= beta_init <= beta_max < math.inf or beta_min == beta_max:
            raise GracecError(
                f"beta_init {beta_init} and its bounds [{beta_min}, {beta_max}] do not fit",
                fix="use 0 <= beta_min <= beta_init <= beta_max and beta_min < beta_max",
            )
        if not 0 <= ema_decay < 1:
            raise GracecError(f"ema_decay is {ema_decay}", fix="use a value in [0, 1)")
        if not (eta > 0 and math.isfinite(eta)):
            raise GracecError(f"eta is {eta}", fix="use a positive number")
        if steps < 1:
            raise GracecError(f"steps is {steps}", fix="give the optimizer steps of the run")
        if isinstance(tau, str) and tau != "auto":
            raise GracecError(f"tau is {tau!r}", fix='use a number or "auto"')
        self.auto = tau == "auto"
        self.tau = None if tau == "auto" else float(tau)
        self.eta, self.ema_decay = eta, ema_decay
        self.beta, self.beta_min, self.beta_max = beta_init, beta_min, beta_max
        self.window = min(AUTO_WINDOW, math.ceil(steps / 10))
        self.auto_eta = (beta_max - beta_min) / (2 * steps)
        self.seen = 0
        self.ema: float | None = None

    def update(self, gdkd: float | Tensor) -> float:
        """One optimizer step; returns the β of the next. Reads a tensor back from its device."""
        loss = finite(gdkd)
        self.seen += 1
        if self.auto and self.seen <= self.window:
            before = 0.0 if self.ema is None else self.ema
            self.ema = before + (loss - before) / self.seen
            self.tau = self.ema / math.sqrt(FALL)
            return self.beta
        ema = loss if self.ema is None else self.ema
        self.ema = self.ema_decay * ema + (1 - self.ema_decay) * loss
        self._move(self._change(self.ema))
        return self.beta

    def _change(self, ema: float) -> float:
        assert self.tau is not None
        if not self.auto:
            return self.eta * (ema - self.tau)
        smallest = 1e-30
        error = math.log(max(ema, smallest) / max(self.tau, smallest))
        return self.auto_eta * min(max(error, -1.0), 1.0)

    def _move(self, change: float) -> None:
        free = self.beta + change
        self.beta = min(max(free, self.beta_min), self.beta_max)
        self.saturated = self.beta != free


class EpochLagrangianController(Controller):
    """λ, in the place of β, rises while the student's misfit exceeds what its codes excuse.

        λ <- max(0, λ + η (L_fidelity - β_cap · L_capacity))        after each epoch; λ starts at 0

    L_fidelity is the mean of L_GDKD over the epoch, in nats; L_capacity is `code_entropy` of all
    quantized weights. The rule is published without these definitions and without β_cap; they are
    choices of gracec.

    Args:
        beta_cap: nats of misfit that a full capacity is worth.
        eta: change of λ for each nat, in [0.01, 1].

    Raises:
        GracecError: if a value is out of its range.
    """

    _state = ("beta", "saturated", "loss_sum", "seen")

    def __init__(self, beta_cap: float = 3.0, eta: float = 0.01) -> None:
        if not 0.01 <= eta <= 1:
            raise GracecError(f"eta is {eta}", fix="the rule is stated for 0.01 to 1")
        if not (beta_cap >= 0 and math.isfinite(beta_cap)):
            raise GracecError(f"beta_cap is {beta_cap}", fix="use a number that is not negative")
        self.beta_cap, self.eta = beta_cap, eta
        self.beta = 0.0
        self.loss_sum, self.seen = 0.0, 0

    def update(self, gdkd: float | Tensor) -> float:
        """One optimizer step: the loss is taken in, β stays."""
        self.loss_sum += finite(gdkd)
        self.seen += 1
        return self.beta

    def end_epoch(self, capacity: float) -> float:
        """The end of an epoch; returns the β of the next.

        Args:
            capacity: `code_entropy` of the quantized weights, in [0, 1].

        Raises:
            GracecError: if the capacity is out of its range or the epoch had no step.
        """
        if not 0 <= capacity <= 1:
            raise GracecError(f"the capacity is {capacity}", fix="use code_entropy")
        if self.seen == 0:
            raise GracecError("an epoch ended without an optimizer step")
        fidelity = self.loss_sum / self.seen
        free = self.beta + self.eta * (fidelity - self.beta_cap * capacity)
        self.beta = max(0.0, free)
        self.saturated = self.beta != free
        self.loss_sum, self.seen = 0.0, 0
        return self.beta


def code_entropy(codes: Tensor | Iterable[Tensor], bits: int) -> float:
    """Empirical entropy of integer codes over their width: -Σ_q f(q) log2 f(q) / bits.

    1 when all 2^bits codes are equally frequent, 0 when only one occurs. Codes of several weights
    are counted together. Reads one small histogram back from the device.

    Args:
        codes: int8 of any shape in [-2^(bits-1), 2^(bits-1) - 1]; or several such tensors.
        bits: width of the codes.

    Raises:
        GracecError: if there is no code, or one is out of range.
    """
    lowest, levels = -(2 ** (bits - 1)), 2**bits
    histogram = torch.zeros(levels, dtype=torch.int64)
    for part in [codes] if isinstance(codes, Tensor) else codes:
        shifted = part.flatten().to(torch.int64) - lowest
        if part.numel() and not 0 <= int(shifted.min()) <= int(shifted.max()) < levels:
            raise GracecError(f"a code is out of the range of {bits} bits", where="codes")
        histogram += shifted.bincount(minlength=levels).cpu()
    if histogram.sum() == 0:
        raise GracecError("there are no codes", where="codes")
    share = histogram.to(torch.float64) / histogram.sum()
    return float(torch.special.entr(share).sum() / (bits * math.log(2)))


def finite(loss: float | Tensor) -> float:
    """The loss as a Python float; `GracecError` if it is not finite."""
    value = loss.item() if isinstance(loss, Tensor) else float(loss)
    if not math.isfinite(value):
        raise GracecError(
            f"the distillation loss of this step is {value}",
            fix="look for NaN in the logits; a lower learning rate often helps",
        )
    return value
