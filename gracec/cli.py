"""The `gracec` command. Exit codes: 0 done, 1 a gate failed, 2 bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(
    name="gracec",
    help="A quantizing compiler for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False)

ModelPath = Annotated[Path, typer.Argument(help="Hugging Face model directory or gracec artifact.")]
Backend = Annotated[
    str | None, typer.Option(help="What runs an artifact: torchao (the default) or onnx.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def main() -> None:
    """Entry point: bad input is one line on standard error, never a traceback."""
    from gracec.errors import GateError, GracecError

    warnings.showwarning = _show_warning
    try:
        app()
    except GateError as error:
        err.print(f"gracec: gate failed: {error}", markup=False)
        sys.exit(1)
    except GracecError as error:
        err.print(f"gracec: {error}", markup=False)
        sys.exit(2)


@app.callback()
def _before_any_command() -> None:
    _quiet_libraries()


@app.command()
def compile(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    output: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    recipe: Annotated[str, typer.Option(help="Built-in name or path of a YAML file.")] = "w4a16",
    teacher: Annotated[Path | None, typer.Option(help="Model directory to distil from.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="To train or calibrate on: conversations, a dataset or questions."),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Chooses the best state; questions are scored as well.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted training.")] = False,
    formats: Annotated[
        str,
        typer.Option("--format", help="For other libraries: hf, torchao, awq, onnx; hf,onnx; all"),
    ] = "hf",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the artifact that --out is, when all is done.")
    ] = False,
    strict: Annotated[
        bool, typer.Option(help="Refuse fallbacks instead of reporting them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile a model to INT4 weights and save the result."""
    import gracec
    from gracec.training.run import rank

    compiled = gracec.compile(
        model,
        recipe,
        teacher=teacher,
        train_data=data,
        eval_data=eval_data,
        resume=resume,
        output_dir=output,
        formats=formats,
        overwrite=overwrite,
        strict=strict,
    )
    if rank():  # another process of this run speaks
        return
    if as_json:
        _print_json({"output": str(output), "report": compiled.report.to_dict()})
        return
    for note in compiled.report.notes:
        out.print(note, markup=False, soft_wrap=True)
    out.print(compiled.report.coverage_table())
    out.print(compiled.report.gates_table())
    out.print(compiled.report.sizes_line())
    if compiled.report.accuracy:
        out.print(compiled.report.accuracy_line())
    out.print(f"saved to {output}", markup=False)


@app.command()
def inspect(
    model: ModelPath,
    recipe: Annotated[
        str, typer.Option(help="What would be quantized: built-in name or YAML file.")
    ] = "w4a16-ptq",
    batch: Annotated[int, typer.Option(min=1, help="Prompts, for the memory plan.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 1,
    text: Annotated[int, typer.Option(min=2, help="Text tokens a prompt.")] = 128,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the parts: a path ending in .svg, .png or .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the parts of a model, the plan and the memory it takes, without reading a weight.

    Of a gracec artifact: what was done to it, every gate and the error of every weight.
    """
    from gracec.report.inspection import inspect_artifact, inspect_model
    from gracec.report.picture import draw_picture
    from gracec.store import is_artifact

    if is_artifact(model):
        report = inspect_artifact(model)
        if picture is not None:
            draw_picture(inspect_model(model, _recipe_of(report)), picture)
        if as_json:
            _print_json({"model": str(model), "report": report.to_dict()})
            return
        tables = [report.coverage_table(), report.errors_table(), report.gates_table()]
        lines = [*report.notes, report.sizes_line()]
    else:
        found = inspect_model(model, recipe, batch=batch, images=images, text=text)
        if picture is not None:
            draw_picture(found, picture)
        if as_json:
            _print_json(found.to_dict())
            return
        out.print(
            f"{found.architecture}, {found.dtype}, {found.blocks} decoder blocks", highlight=False
        )
        tables = [found.partition_table(), found.plan_table()]
        summary = f"{found.recipe} quantizes {found.coverage:.1%} of the bytes of all matrices"
        lines = [*found.notes, summary, *found.memory.lines()]
    for table in tables:
        out.print(table)
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    artifacts: Annotated[
        list[Path], typer.Argument(help="gracec artifacts; the page is about the first one.")
    ],
    output: Annotated[
        Path | None, typer.Option("--out", help="File to write. [default: ARTIFACT/report.html]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Questions to ask all of them, to show what differs.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 200,
) -> None:
    """Write what was done to a model, with pictures, into one HTML file that needs nothing else.

    With several artifacts: their accuracies against their sizes, and with --data the questions that
    the first one answers and another does not, and the other way round.
    """
    from gracec.evaluate import load_samples
    from gracec.report.page import write_report_page

    target = output or artifacts[0] / "report.html"
    write_report_page(artifacts, target, load_samples(data, limit) if data is not None else [])
    out.print(f"wrote {target}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor(
    model: Annotated[Path, typer.Argument(help="Anything that may be a model directory.")],
    recipe: Annotated[str, typer.Option(help="The recipe that has to be open.")] = "w4a16-ptq",
    as_json: Json = False,
) -> None:
    """Say what of a model can be compiled, and what blocks where. Exit code 1 if anything does."""
    from gracec.doctor import Check, diagnose

    def show(check: Check) -> None:
        if not as_json:
            typer.echo(check.line())

    found = diagnose(model, recipe, show)
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(found.verdict())
    if not found.compiles:
        raise typer.Exit(1)


@app.command()
def opt(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    passes: Annotated[str, typer.Option(help="'pass,pass{option=value}', run in this order.")],
    print_before: Annotated[bool, typer.Option(help="Print the captured program first.")] = False,
    print_after_all: Annotated[bool, typer.Option(help="Print it after each pass.")] = False,
    diff_after_all: Annotated[bool, typer.Option(help="Print what each pass changed.")] = False,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write to this file, not to standard output.")
    ] = None,
) -> None:
    """Run passes on a captured model and print its text: at the end, or after each of them."""
    from gracec import ir
    from gracec.capture import capture
    from gracec.errors import GracecError
    from gracec.models import load_model
    from gracec.passes import Pass, PassResult, parse_pipeline, run_passes
    from gracec.program import Program
    from gracec.store import is_artifact

    pipeline = parse_pipeline(passes)
    if is_artifact(model):
        raise GracecError(
            "a gracec artifact, which is compiled already",
            where=str(model),
            fix="give the directory of the original model",
        )

    with _destination(output) as write:

        def show(item: Pass, before: Program, result: PassResult) -> None:
            if not (print_after_all or diff_after_all):
                for note in result.notes:
                    err.print(f"{item.name}: {note}", markup=False)
                return
            state = "modified" if result.modified else "unchanged"
            notes = f": {'; '.join(result.notes)}" if result.notes else ""
            write(f"// ----- after {item.name} ({state}){notes} -----")
            if diff_after_all:
                write(ir.diff(before, result.program))
            if print_after_all:
                write(ir.format(result.program))

        program = capture(load_model(model))
        if print_before:
            write("// ----- captured -----")
            write(ir.format(program))
        result = run_passes(program, pipeline, show)
        if not (print_after_all or diff_after_all):
            if print_before:
                write(f"// ----- after {pipeline[-1].name} -----")
            write(ir.format(result.program))


@app.command()
def passes(as_json: Json = False) -> None:
    """List the passes that `gracec opt` can run, with their options and defaults."""
    from gracec.passes import all_passes

    found: dict[str, dict[str, Any]] = {
        name: {"does": _first_sentence(name, cls), "options": _options(cls)}
        for name, cls in sorted(all_passes().items())
    }
    if as_json:
        _print_json(found)
        return
    for name, entry in found.items():
        options = " ".join(f"{key}={value}" for key, value in entry["options"].items())
        typer.echo(f"{name}: {entry['does']}")
        if options:
            typer.echo(f"    {{{options}}}")


@app.command()
def run(
    model: ModelPath,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Ask a model one question about one picture; the answer appears word by word."""
    from transformers import TextStreamer

    from gracec.evaluate import answer, load_image

    picture = load_image(image)
    loaded, processor = _load(model, backend)
    streamer = None
    if not as_json:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = answer(
        loaded, processor, picture, prompt, max_new_tokens=max_new_tokens, streamer=streamer
    )
    if as_json:
        _print_json({"model": str(model), "image": str(image), "prompt": prompt, "answer": text})


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Directory compiled with --format onnx.")],
    page: Annotated[
        Path, typer.Option("--app", help="Folder of the page, with its packages installed.")
    ] = Path("examples/browser"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
) -> None:
    """Let a browser on this machine run a model: serve it and a page that asks it about images."""
    from gracec.serve import Server

    with Server(model, page, host, port) as server:
        typer.echo(f"{server.url} (Ctrl+C ends it)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


@app.command()
def eval(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="Folder with samples.jsonl and its images.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use an even spread of samples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 8,
    blind: Annotated[bool, typer.Option(help="Also ask without the image.")] = True,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Accuracy by type of question, beside the blind, majority and chance rates."""
    from gracec.evaluate import evaluate_vqa, format_table, load_samples

    samples = load_samples(data, limit)
    loaded, processor = _load(model, backend)
    with Progress(console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(model.name, total=len(samples))
        report = evaluate_vqa(
            loaded,
            processor,
            samples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            blind=blind,
            progress=lambda done, _: progress.update(task, completed=done),
        )
    if as_json:
        _print_json({"model": str(model), "data": str(data), **report.to_dict()})
    else:
        out.print(format_table({model.name: report}))


@app.command()
def demo(
    example: Annotated[Path, typer.Option(help="Example with teacher, student and data.")] = Path(
        "examples/emojivqa"
    ),
    output: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")] = Path(
        "out/demo"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask each model.")] = 2000,
    as_json: Json = False,
) -> None:
    """Compile the shipped student, and let teacher, student and INT4 student answer questions."""
    from gracec.demo import run_demo

    result = run_demo(example, output, limit=limit, console=err if as_json else out)
    if as_json:
        _print_json(result)


def _load(directory: Path, backend: str | None = None) -> tuple[Any, Any]:
    """A model that generates and its processor, from an artifact or a Hugging Face directory."""
    import gracec
    from gracec.models import load_model, load_processor
    from gracec.store import is_artifact

    if backend is not None:
        loaded: Any = gracec.load(directory, backend)  # type: ignore[call-overload]
        return loaded, loaded.processor
    if is_artifact(directory):
        compiled = gracec.load(directory)
        return compiled, compiled.processor
    return load_model(directory), load_processor(directory)


def _recipe_of(report: Any) -> Any:
    from gracec.recipe import Recipe

    return Recipe.from_dict(dict(report.recipe))


@contextmanager
def _destination(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Plain lines, never wrapped or coloured, to standard output or to a file."""
    from gracec.errors import GracecError

    if path is None:
        yield lambda text: typer.echo(text.rstrip("\n"))
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise GracecError(f"cannot be written ({error.strerror})", where=str(path)) from error
    with file:
        yield lambda text: print(text.rstrip("\n"), file=file, flush=True)


def _options(pass_class: Any) -> dict[str, Any]:
    """Name -> default of the options that can be written as text."""
    fields = dataclasses.fields(pass_class)
    return {f.name: f.default for f in fields if isinstance(f.default, (bool, int, float, str))}


def _first_sentence(name: str, pass_class: Any) -> str:
    """What the first line of a pass's file says after its name, or that of its class."""
    for text in (sys.modules[pass_class.__module__].__doc__, pass_class.__doc__):
        first = (text or "").strip().partition("\n")[0]
        if first.startswith(f"{name}: "):
            return first.removeprefix(f"{name}: ").rstrip(".")
    return first.rstrip(".")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of gracec is one line; others are shown as Python does."""
    from gracec.errors import GracecWarning

    if issubclass(category, GracecWarning):
        err.print(f"gracec: warning: {message}", markup=False)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _quiet_libraries() -> None:
    """Progress bars and log lines of transformers tell a user of gracec nothing to act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    main()
