"""What a pass is, and the runner that applies passes in the order given."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.ir.text import operators
from gracec.journal import Note
from gracec.passes.options import write_options
from gracec.registry import Registry


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the result; the input program is never changed.
        modified: whether anything is different from the input.
        notes: one line per decision a user would want to know, refusals with their reason first.
    """

    program: Program
    modified: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite or an analysis of a `Program`.

    Subclasses are frozen dataclasses whose fields are their options, so that a pipeline can be
    written as text: `plan-quantization{recipe=w4a16-ptq strict=true}`. `str` prints that text.
    `gracec.passes.contract` checks what all of them promise.
    """

    name: ClassVar[str]
    keeps_numerics: ClassVar[bool]
    """Whether the outputs of the program are the same bit for bit afterwards."""

    def requires(self, program: Program) -> None:
        """Raise `PassError` with the reason if the pass cannot run on this program."""

    @abstractmethod
    def apply(self, program: Program) -> PassResult:
        """Change `program` (a copy that is the pass's own) and say what was done."""

    def ensures(self, before: Program, after: Program) -> None:
        """Raise `PassError` if the result is not what the pass promises."""

    def run(self, program: Program) -> PassResult:
        """Check, apply to a copy, check again."""
        self.requires(program)
        result = self.apply(program.copy())
        result.program.recompile()
        self.ensures(program, result.program)
        return result

    def __str__(self) -> str:
        options = write_options(self)
        return f"{self.name}{{{options}}}" if options else self.name

    def refuse(self, reason: str, *, where: str = "", fix: str = "") -> PassError:
        """The error to raise from `requires` and `ensures`."""
        return PassError(f"{self.name}: {reason}", where=where, fix=fix)


@dataclass(frozen=True)
class PassRun:
    """One pass of a pipeline that ran.

    Attributes:
        item: the pass.
        modified, notes: as its result says.
        seconds: that it took, its checks included.
        operators: op -> how many more of them there are than before, those that changed only.
    """

    item: Pass
    modified: bool
    notes: tuple[str, ...]
    seconds: float
    operators: Counter[str]


@dataclass(frozen=True)
class PipelineResult:
    """What passes did, one after the other.

    Attributes:
        program: that of the last pass.
        modified: whether any of them changed anything.
        notes: those of all passes; the source of each is the name of its pass.
        runs: one for each pass.
    """

    program: Program
    modified: bool
    notes: tuple[Note, ...] = ()
    runs: tuple[PassRun, ...] = ()


LOGGER = logging.getLogger(__name__)

Observer = Callable[[Pass, Program, PassResult], None]


def run_passes(
    program: Program, passes: Sequence[Pass], observe: Observer | None = None
) -> PipelineResult:
    """Run passes in the order given.

    Args:
        observe: called after each pass with the pass, the program before it and its result.
    """
    runs = []
    for item in passes:
        start = time.perf_counter()
        result = item.run(program)
        seconds = time.perf_counter() - start
        change = operators(result.program)
        change.subtract(operators(program))
        changed = Counter({op: count for op, count in change.items() if count})
        LOGGER.info("pass %s %.2f s", item.name, seconds)
        runs.append(PassRun(item, result.modified, result.notes, seconds, changed))
        if observe is not None:
            observe(item, program, result)
        program = result.program
    notes = [Note(run.item.name, text) for run in runs for text in run.notes]
    modified = any(run.modified for run in runs)
    return PipelineResult(program, modified, tuple(notes), tuple(runs))


PASSES: Registry[Pass] = Registry("pass", Pass, "gracec.passes")  # type: ignore[type-abstract]
"""Every pass: those of this package, those that another package declares as an entry point of
`gracec.passes`, and those of any module imported so far."""


def all_passes() -> dict[str, type[Pass]]:
    """Name -> class of every pass that `PASSES` knows.

    A pass of one's own needs no registration: importing the module that defines it is enough.
    """
    return PASSES.all()
