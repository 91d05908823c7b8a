"""Commands that run single passes: `opt` and `passes`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from gracec.cli.app import Json, command, err, print_json
from gracec.cli.logs import is_quiet


@command
def opt(
    model: Annotated[
        str, typer.Argument(help="Model: a directory, or org/name on the Hugging Face Hub.")
    ],
    passes: Annotated[str, typer.Option(help="'pass,pass{option=value}', run in this order.")],
    print_before: Annotated[bool, typer.Option(help="Print the captured program first.")] = False,
    print_after_all: Annotated[bool, typer.Option(help="Print it after each pass.")] = False,
    diff_after_all: Annotated[bool, typer.Option(help="Print what each pass changed.")] = False,
    disable_pass: Annotated[
        list[str] | None, typer.Option(help="Leave this pass out; may be given several times.")
    ] = None,
    time: Annotated[
        bool, typer.Option(help="Say on standard error what each pass took and added.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write to this file, not to standard output.")
    ] = None,
) -> None:
    """Run passes on a captured model and print its text: at the end, or after each of them."""
    from gracec import ir
    from gracec.capture import capture
    from gracec.errors import GracecError
    from gracec.ir.program import Program
    from gracec.models.hub import find_model
    from gracec.passes import Pass, PassResult, parse_pipeline, run_passes
    from gracec.stages.source import weights_source
    from gracec.store import is_artifact

    pipeline = parse_pipeline(passes).without(*(disable_pass or ()))
    place = find_model(model)
    if is_artifact(place.path):
        raise GracecError(
            "a gracec artifact, which is compiled already",
            where=str(place),
            fix="give the directory of the original model",
        )

    with _destination(output) as write:

        def show(item: Pass, before: Program, result: PassResult) -> None:
            if not (print_after_all or diff_after_all):
                for note in () if is_quiet() else result.notes:
                    err.print(f"{item.name}: {note}", markup=False)
                return
            state = "modified" if result.modified else "unchanged"
            notes = f": {'; '.join(result.notes)}" if result.notes else ""
            write(f"// ----- after {item.name} ({state}){notes} -----")
            if diff_after_all:
                write(ir.diff(before, result.program))
            if print_after_all:
                write(ir.format(result.program))

        program = capture(weights_source(place.path).model)
        if print_before:
            write("// ----- captured -----")
            write(ir.format(program))
        result = run_passes(program, pipeline, show)
        if not (print_after_all or diff_after_all):
            if print_before:
                write(f"// ----- after {pipeline.names[-1] if pipeline else 'no pass'} -----")
            write(ir.format(result.program))
    if time:
        for run in result.runs:
            err.print(_time_line(run), markup=False)


@command
def passes(as_json: Json = False) -> None:
    """List the passes that `gracec opt` can run, with their options and defaults."""
    from gracec.passes import all_passes
    from gracec.passes.options import options_of

    found = all_passes()
    if as_json:
        print_json({name: _described(cls) for name, cls in found.items()})
        return
    for name, cls in found.items():
        origin = "" if cls.__module__.startswith("gracec.") else f" (from {cls.__module__})"
        typer.echo(f"{name}: {_first_sentence(name, cls)}{origin}")
        options = " ".join(
            f"{option.name}={option.write_default()}"
            for option in options_of(cls).values()
            if option.has_text_form
        )
        if options:
            typer.echo(f"    {{{options}}}")


@contextmanager
def _destination(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Plain lines, never wrapped or coloured, to standard output or to a file."""
    from gracec.directories import writing

    if path is None:
        yield lambda text: typer.echo(text.rstrip("\n"))
        return
    with writing(path) as file:
        yield lambda text: print(text.rstrip("\n"), file=file)


def _time_line(run: Any) -> str:
    """`insert-fake-quant 0.12 s: +14 gracec.fake_quantize` of a `PassRun`."""
    changes = [f"{count:+d} {op}" for op, count in sorted(run.operators.items())]
    return f"{run.item.name} {run.seconds:.2f} s: {', '.join(changes) or 'the same operators'}"


def _described(pass_class: Any) -> dict[str, Any]:
    """What a pass does, where it comes from, the defaults of the options that can be written as
    text, and those of them that have none."""
    from gracec.passes.options import OPAQUE, options_of

    options = [option for option in options_of(pass_class).values() if option.has_text_form]
    defaults = {
        option.name: OPAQUE if option.write(option.default) == OPAQUE else option.default
        for option in options
        if not option.is_required
    }
    return {
        "does": _first_sentence(pass_class.name, pass_class),
        "from": pass_class.__module__,
        "options": defaults,
        "required": [option.name for option in options if option.is_required],
    }


def _first_sentence(name: str, pass_class: Any) -> str:
    """What the first line of a pass's file says after its name, or that of its class."""
    module = sys.modules.get(pass_class.__module__)
    for text in (module.__doc__ if module else "", pass_class.__doc__):
        first = (text or "").strip().partition("\n")[0]
        if first.startswith(f"{name}: "):
            return first.removeprefix(f"{name}: ").rstrip(".")
    return first.rstrip(".")
