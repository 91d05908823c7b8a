"""The `gracec` command. Exit codes: 0 done, 1 a gate failed, 2 bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

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
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def main() -> None:
    """Entry point: bad input is one line on standard error, never a traceback."""
    from gracec.errors import GateError, GracecError

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
    output: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist.")],
    recipe: Annotated[
        str, typer.Option(help="Built-in name or path of a YAML file.")
    ] = "w4a16-ptq",
    strict: Annotated[
        bool, typer.Option(help="Refuse fallbacks instead of reporting them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile a model to INT4 weights and save the result."""
    import gracec

    compiled = gracec.compile(model, recipe, output_dir=output, strict=strict)
    if as_json:
        _print_json({"output": str(output), "report": compiled.report.to_dict()})
        return
    for note in compiled.report.notes:
        out.print(note, markup=False, soft_wrap=True)
    out.print(compiled.report.coverage_table())
    out.print(compiled.report.gates_table())
    out.print(compiled.report.sizes_line())
    out.print(f"saved to {output}", markup=False)


@app.command()
def run(
    model: ModelPath,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Ask a model one question about one picture."""
    from gracec.evaluate import answer, load_image

    loaded, processor = _load(model)
    text = answer(loaded, processor, load_image(image), prompt, max_new_tokens=max_new_tokens)
    if as_json:
        _print_json({"model": str(model), "image": str(image), "prompt": prompt, "answer": text})
    else:
        out.print(text, markup=False, highlight=False)


@app.command()
def eval(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="Folder with samples.jsonl and its images.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use an even spread of samples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 8,
    blind: Annotated[bool, typer.Option(help="Also ask without the image.")] = True,
    as_json: Json = False,
) -> None:
    """Accuracy by type of question, beside the blind, majority and chance rates."""
    from gracec.evaluate import evaluate_vqa, format_table, load_samples

    samples = load_samples(data, limit)
    loaded, processor = _load(model)
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
    limit: Annotated[int | None, typer.Option(min=1, help="Questions to ask each model.")] = None,
    as_json: Json = False,
) -> None:
    """Compile the shipped student, and let teacher, student and INT4 student answer questions."""
    from gracec.demo import run_demo

    result = run_demo(example, output, limit=limit, console=err if as_json else out)
    if as_json:
        _print_json(result)


def _load(directory: Path) -> tuple[Any, Any]:
    """A model that generates and its processor, from an artifact or a Hugging Face directory."""
    import gracec
    from gracec.models import load_model, load_processor
    from gracec.store import is_artifact

    if is_artifact(directory):
        compiled = gracec.load(directory)
        return compiled, compiled.processor
    return load_model(directory), load_processor(directory)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _quiet_libraries() -> None:
    """Progress bars and log lines of transformers tell a user of gracec nothing to act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    main()
