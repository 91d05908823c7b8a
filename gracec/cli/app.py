"""What all commands share: the application, where they print, options of the same name."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperCommand

app = typer.Typer(
    name="gracec",
    help="A quantizing compiler for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


out = Console()


err = Console(stderr=True, soft_wrap=True, highlight=False)


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model or gracec artifact: a directory, or org/name on the Hugging Face Hub.",
    ),
]


Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hugging Face Hub.")
]


TeacherName = Annotated[
    str | None, typer.Option("--teacher", help="Model to distil from, named as MODEL is.")
]


TeacherRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the teacher on the Hub.")
]


Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]


Dtype = Annotated[
    str | None,
    typer.Option(help="What to compute in: float32, bfloat16, float16. [default: as stored]"),
]


TargetName = Annotated[
    str | None,
    typer.Option("--target", "--backend", help="What runs it: {targets} (torchao by default)."),
]


RunnerName = Annotated[
    str | None,
    typer.Option(
        "--target",
        "--backend",
        help="What runs it: {targets}; by default onnxruntime where MODEL has ONNX graphs and runs "
        "on the CPU, else torchao.",
    ),
]


OnnxOps = Annotated[
    str | None,
    typer.Option("--ops", help="Operators of ONNX graphs: matmulnbits, qdq. [default: recipe]"),
]


OnnxMode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        help="How ONNX graphs compute: fast (8-bit inputs), faithful (float32), auto. "
        "[default: recipe]",
    ),
]


Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and the result only.")]


Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also say what is done, and the seconds it takes.")
]


MOST_TOKENS, MOST_IMAGES, MOST_AT_ONCE, MOST_QUESTIONS = 1 << 20, 1 << 8, 1 << 16, 1 << 31


def text(value: str, option: str) -> str:
    """What was given on the command line, if it is text: the system passes any bytes.

    Raises:
        GracecError: if it is not.
    """
    from gracec.errors import GracecError

    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise GracecError(f"holds bytes that are no UTF-8: {value!r}", where=option) from error
    return value


class WithNames(TyperCommand):
    """A command whose help names what the registries know; they are read when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from gracec.backends.base import FORMATS
        from gracec.recipe import known_recipes
        from gracec.targets.base import TARGETS

        names = {
            "{targets}": ", ".join(TARGETS.all()),
            "{formats}": ", ".join(FORMATS.all()),
            "{recipes}": ", ".join(known_recipes()),
        }
        for parameter in self.params:
            for place, known in names.items():
                if getattr(parameter, "help", None):
                    parameter.help = parameter.help.replace(place, known)  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command, with the options that all of them have."""
    hints = get_type_hints(function, include_extras=True)

    def run(quiet: bool = False, verbose: bool = False, **given: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose exclude each other")
        if quiet or verbose:
            logging.getLogger("gracec").setLevel(logging.ERROR if quiet else logging.INFO)
        function(**given)

    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(name, kind, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    own = [one.replace(kind=kind) for one in inspect.signature(function).parameters.values()]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {**hints, "quiet": Quiet, "verbose": Verbose}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*(one.replace(annotation=hints[one.name]) for one in own), *shared]
    )
    app.command(cls=WithNames)(run)
    return function


def print_json(value: Any) -> None:
    """One object on standard output."""
    typer.echo(json.dumps(value, indent=1))
