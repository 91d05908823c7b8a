"""What is written down during a compilation: typed notes and figures. The report is made from it.

    journal = Journal()
    journal.note("freeze", "28 weights frozen to codes")
    journal.figures["matmul_error"] = Error(3.6e-3, bound=1e-2, unit="of the largest output")

It is the only thing that stages write to; everything else they take and return.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Note:
    """One thing that a user should know.

    Attributes:
        source: the pass, stage or format that says it; may be empty.
        text: what it says, one line.
    """

    source: str
    text: str

    def __str__(self) -> str:
        return f"{self.source}: {self.text}" if self.source else self.text

    def to_dict(self) -> dict[str, str]:
        """JSON-able; `of` reads it back."""
        return {"source": self.source, "text": self.text}

    @classmethod
    def of(cls, saved: Any) -> Note:
        """From JSON; reports were once written with notes as plain text."""
        return cls(**saved) if isinstance(saved, Mapping) else cls("", str(saved))


class Figure(Protocol):
    """What a gate found, beside what it allows."""

    kind: ClassVar[str]

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Equal:
    """Things that were compared and are the same bit for bit.

    Attributes:
        count: how many.
        unit: of what: "batches", "outputs".
    """

    count: int
    unit: str
    kind: ClassVar[str] = "equal"

    def __str__(self) -> str:
        return f"equal bits, {self.count} {self.unit}"


@dataclass(frozen=True)
class Error:
    """The largest error that was found, and the largest that passes.

    Attributes:
        unit: what it is a share of, or measured in.
    """

    value: float
    bound: float
    unit: str
    kind: ClassVar[str] = "error"

    def __str__(self) -> str:
        return f"{self.value:.3g} {self.unit}, at most {self.bound:.3g}"


@dataclass(frozen=True)
class Kernels:
    """Kernels that ran, and those that were planned."""

    count: int
    planned: int
    kind: ClassVar[str] = "kernels"

    def __str__(self) -> str:
        return f"{self.count} of {self.planned} planned"


@dataclass(frozen=True)
class Agreement:
    """Logits beside those of a reference.

    Attributes:
        kl: mean KL divergence from the reference per position, in nats.
        top1: share of positions with the same most likely token.
        top1_clear: the same, only where the reference is no near-tie.
        bound: the largest KL divergence that passes; None where this is what others are held to.
    """

    kl: float
    top1: float
    top1_clear: float
    bound: float | None = None
    kind: ClassVar[str] = "agreement"

    def __str__(self) -> str:
        allowed = "" if self.bound is None else f", at most {self.bound:.4g}"
        same = f"top-1 {self.top1:.4g}, {self.top1_clear:.4g} without near-ties"
        return f"KL {self.kl:.4g} nats{allowed}; {same}"


@dataclass(frozen=True)
class Unbound:
    """A figure of a report that was written before figures had bounds."""

    value: Any
    kind: ClassVar[str] = "unbound"

    def __str__(self) -> str:
        if isinstance(self.value, Mapping):
            return ", ".join(f"{name} {_short(value)}" for name, value in self.value.items())
        return f"{self.value:.3g}" if isinstance(self.value, float) else str(self.value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


KINDS: dict[str, type[Any]] = {
    kind.kind: kind for kind in (Equal, Error, Kernels, Agreement, Unbound)
}


def figure_to_dict(figure: Any) -> dict[str, Any]:
    """JSON-able; `figure_of` reads it back."""
    return {"kind": figure.kind, **asdict(figure)}


def figure_of(saved: Any) -> Figure:
    """A figure from JSON."""
    kind = saved.get("kind") if isinstance(saved, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        return Unbound(saved)
    fields = dict(saved)
    found: Figure = KINDS[fields.pop("kind")](**fields)
    return found


@dataclass
class Journal:
    """Notes in the order in which they were made, figures by the name of their gate.

    Attributes:
        plan, sizes, accuracy, training: as a report has them.
        ptq_sqnr_db: FQN -> signal to quantization noise in decibel before training.
        output_errors: FQN -> shares of the energy of the output, of the codes of the plan: of plain
            rounding, of rounding on the searched scales, and as compiled.
        codes: FQN -> "corrected", "partly" or "rounded", where codes were calibrated on data.
    """

    notes: list[Note] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    plan: tuple[Any, ...] = ()
    ptq_sqnr_db: dict[str, float] = field(default_factory=dict)
    output_errors: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def note(self, source: str, *texts: str) -> None:
        """Write down what a stage has to say."""
        self.notes += [Note(source, text) for text in texts]

    def extend(self, notes: Iterable[Note]) -> None:
        """Write down notes that something else has made."""
        self.notes += notes
