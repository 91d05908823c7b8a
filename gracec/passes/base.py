"""What a pass is, and the runner that applies passes in the order given."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args, get_type_hints

from gracec.errors import GracecError, PassError
from gracec.program import Program


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
    written as text: `plan-quantization{recipe=w4a16-ptq strict=true}`.
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

    def refuse(self, reason: str, *, where: str = "", fix: str = "") -> PassError:
        """The error to raise from `requires` and `ensures`."""
        return PassError(f"{self.name}: {reason}", where=where, fix=fix)


Observer = Callable[[Pass, Program, PassResult], None]


def run_passes(
    program: Program, passes: Sequence[Pass], observe: Observer | None = None
) -> PassResult:
    """Run passes in the order given.

    Args:
        observe: called after each pass with the pass, the program before it and its result.
    """
    modified, notes = False, []
    for item in passes:
        result = item.run(program)
        if observe is not None:
            observe(item, program, result)
        notes += [f"{item.name}: {note}" for note in result.notes]
        modified |= result.modified
        program = result.program
    return PassResult(program, modified, tuple(notes))


def all_passes() -> dict[str, type[Pass]]:
    """Name -> class of every pass: those of this package, and those of any module imported so far.

    A pass of one's own needs no registration: importing the module that defines it is enough.
    """
    package = importlib.import_module("gracec.passes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"gracec.passes.{module.name}")
    found: dict[str, type[Pass]] = {}
    pending = [Pass]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if not inspect.isabstract(cls):
                found[cls.name] = cls
    return dict(sorted(found.items()))


def parse_pipeline(text: str) -> list[Pass]:
    """Passes from text: `analyze-modality,plan-quantization{recipe=w4a16-ptq},insert-fake-quant`.

    Raises:
        GracecError: for an unknown pass or option, with the nearest known name.
    """
    items = re.findall(r"([^,{}\s]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)", text)
    written = re.sub(r"[\s,]", "", text)
    understood = "".join(name + (f"{{{options}}}" if options else "") for name, options in items)
    if not items or re.sub(r"[\s,{}]", "", understood) != re.sub(r"[{}]", "", written):
        raise GracecError(
            f"cannot read the pipeline {text!r}", fix="write it as pass,pass{option=value}"
        )
    return [_build(name, options) for name, options in items]


def _build(name: str, options: str) -> Pass:
    cls = _lookup(name, all_passes(), "pass")
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for option in options.split():
        key, _, value = option.partition("=")
        key = key.replace("-", "_")
        if not _has_text_form(known.get(key, str)):
            raise GracecError(f"option {key!r} of {name} cannot be given as text", fix="use Python")
        values[key] = _convert(value, _lookup(key, known, f"option of {name}"), f"{name}.{key}")
    built: Pass = cls(**values)
    return built


def _has_text_form(kind: Any) -> bool:
    union = isinstance(kind, types.UnionType)
    return kind in (bool, int, float, str) or (union and str in get_args(kind))


def _lookup(name: str, known: dict[str, Any], kind: str) -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
    raise GracecError(f"unknown {kind} {name!r}", fix=hint)


def _convert(value: str, kind: Any, where: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "": True}[value]
        return kind(value) if kind in (int, float, str) else value
    except (KeyError, ValueError):
        raise GracecError(f"{value!r} is not a {kind.__name__}", where=where) from None
