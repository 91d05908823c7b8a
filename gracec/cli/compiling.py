"""Commands that compile a model, or say what compiling did or would do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from gracec.cli.app import (
    MOST_AT_ONCE,
    MOST_IMAGES,
    MOST_QUESTIONS,
    MOST_TOKENS,
    Device,
    Dtype,
    Json,
    ModelName,
    OnnxMode,
    OnnxOps,
    Revision,
    TargetName,
    TeacherName,
    TeacherRevision,
    command,
    out,
    print_json,
)
from gracec.cli.logs import is_quiet


@command
def compile(
    model: Annotated[
        str, typer.Argument(help="Model: a directory, or org/name on the Hugging Face Hub.")
    ],
    output: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    recipe: Annotated[
        str, typer.Option(help="Path of a YAML file, or one of {recipes}.")
    ] = "w4a16",
    teacher: TeacherName = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to learn: conversations, questions or a dataset, which may be org/name or "
            "org/name:split on the Hugging Face Hub. With a recipe that does not train: what to "
            "calibrate on, which may be plain text (.txt, .md) as well."
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Chooses the best state; questions are scored as well.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted training or calibration.")
    ] = False,
    formats: Annotated[
        str,
        typer.Option("--format", help="For other libraries: {formats}; hf,onnx; all; none."),
    ] = "hf",
    target: TargetName = None,
    ops: OnnxOps = None,
    mode: OnnxMode = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="A further pass: 'PASS{option=value} after PASS'."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the artifact that --out is, when all is done.")
    ] = False,
    strict: Annotated[
        bool, typer.Option(help="Refuse fallbacks instead of reporting them.")
    ] = False,
    check_reload: Annotated[
        bool | None,
        typer.Option(
            help="Load the result in a fresh process and compare. [default: check-reload]",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    teacher_revision: TeacherRevision = None,
    device: Device = None,
    dtype: Dtype = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Tracker of a training: tensorboard, wandb, ...; again for more."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a model to INT4 weights and save the result."""
    import gracec
    from gracec.training.ranks import rank

    compiled = gracec.compile(
        model,
        _with_onnx(recipe, formats, target, ops=ops, mode=mode),
        teacher=teacher,
        train_data=data,
        eval_data=eval_data,
        resume=resume,
        output_dir=output,
        formats=formats,
        target=target,
        passes=passes or (),
        overwrite=overwrite,
        strict=strict,
        check_reload=check_reload,
        revision=revision,
        teacher_revision=teacher_revision,
        device=device,
        dtype=dtype,
        progress=not is_quiet(),
        report_to=report_to,
    )
    if rank():  # another process of this run speaks
        return
    if as_json:
        print_json({"output": str(output), "report": compiled.report.to_dict()})
        return
    if is_quiet():
        out.print(f"saved to {output}", markup=False)
        return
    for note in compiled.report.notes:
        out.print(str(note), markup=False, soft_wrap=True)
    out.print(compiled.report.coverage_table())
    out.print(compiled.report.gates_table())
    out.print(compiled.report.sizes_line())
    if compiled.report.output_error_line():
        out.print(compiled.report.output_error_line())
    if compiled.report.accuracy:
        out.print(compiled.report.accuracy_line())
    out.print(f"saved to {output}", markup=False)


@command
def inspect(
    model: ModelName,
    recipe: Annotated[
        str, typer.Option(help="What would be quantized: built-in name or YAML file.")
    ] = "w4a16-ptq",
    batch: Annotated[
        int, typer.Option(min=1, max=MOST_AT_ONCE, help="Prompts, for the memory plan.")
    ] = 1,
    images: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Images a prompt.")] = 1,
    text: Annotated[int, typer.Option(min=2, max=MOST_TOKENS, help="Text tokens a prompt.")] = 128,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the parts: a path ending in .svg, .png or .pdf.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show the parts of a model, the plan and the memory it takes, without reading a weight.

    Of a gracec artifact: what was done to it, every gate, and the errors of every weight and, where
    codes were corrected, of its output.
    """
    from gracec.inspection import inspect_artifact, inspect_model
    from gracec.models.hub import find_description
    from gracec.report.picture import draw_picture
    from gracec.store import is_artifact

    place = find_description(model, revision)
    if is_artifact(place.path):
        report = inspect_artifact(place)
        if picture is not None:
            draw_picture(inspect_model(place, _recipe_of(report)), picture)
        if as_json:
            print_json({"model": str(place), "report": report.to_dict()})
            return
        trained = None
        tables = [report.coverage_table(), report.errors_table(), report.gates_table()]
        lines = [*report.notes, report.sizes_line(), report.output_error_line()]
    else:
        found = inspect_model(place, recipe, batch=batch, images=images, text=text)
        if picture is not None:
            draw_picture(found, picture)
        if as_json:
            print_json(found.to_dict())
            return
        out.print(
            f"{found.architecture}, {found.dtype}, {found.blocks} decoder blocks", highlight=False
        )
        tables, trained = [found.partition_table(), found.plan_table()], found.training
        summary = f"{found.recipe} quantizes {found.coverage:.1%} of the bytes of all matrices"
        lines = [*found.notes, summary, *found.memory.lines()]
    for table in tables:
        out.print(table)
    print_lines(lines)
    if trained is not None:
        show_plan(trained)


@command
def plan(
    model: ModelName,
    recipe: Annotated[
        str, typer.Option(help="A recipe that trains: built-in name or YAML file.")
    ] = "w4a16",
    teacher: TeacherName = None,
    data: Annotated[
        str | None,
        typer.Option(help="What is learned, as for compile; some of it is read, to count tokens."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, max=MOST_AT_ONCE, help="How many there are.")] = 1,
    memory_per_device: Annotated[str, typer.Option(help="Such as 80GB, or 24GiB.")] = "80GB",
    device_tflops: Annotated[
        float | None,
        typer.Option(
            help="What a device reaches in matmuls of the recipe's precision, in 10^12 operations "
            "a second. [default: 350 in bfloat16, 45 in float32; cpu: 0.1]",
            show_default=False,
        ),
    ] = None,
    device_bandwidth: Annotated[
        float | None,
        typer.Option(
            help="Memory that a device reads and writes, in 10^9 bytes a second. "
            "[default: 2000; cpu: 20]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="What it trains on: cuda or cpu.")] = "cuda",
    images: Annotated[
        int, typer.Option(min=0, max=MOST_IMAGES, help="Pictures a sample, without --data.")
    ] = 1,
    picture: Annotated[
        str, typer.Option(help="Their width and height in pixels, without --data.")
    ] = "640x480",
    text: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of text a sample, without --data.")
    ] = 128,
    answer: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Of these, tokens that are learned.")
    ] = 64,
    revision: Revision = None,
    teacher_revision: TeacherRevision = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Plan a training: memory of every kind, seconds of a step, and settings that fit.

    No weight is read: of a model and a teacher their configurations are enough.
    """
    import gracec
    from gracec.training.planned_samples import Stated

    found = gracec.plan(
        model,
        recipe,
        teacher=teacher,
        data=data,
        devices=devices,
        memory_per_device=memory_per_device,
        device_tflops=device_tflops,
        device_bandwidth=device_bandwidth,
        device=device,
        dtype=dtype,
        stated=Stated.of(images, picture, text, answer),
        revision=revision,
        teacher_revision=teacher_revision,
    )
    if as_json:
        print_json(found.to_dict())
        return
    show_plan(found)


@command
def report(
    artifacts: Annotated[
        list[str],
        typer.Argument(help="gracec artifacts, also on the Hub; the page is about the first one."),
    ],
    output: Annotated[
        Path | None, typer.Option("--out", help="File to write. [default: ARTIFACT/report.html]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Questions to ask all of them, to show what differs.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST_QUESTIONS, help="Questions to ask.")] = 200,
) -> None:
    """Write what was done to a model, with pictures, into one HTML file that needs nothing else.

    With several artifacts: their accuracies against their sizes, and with --data the questions that
    the first one answers and another does not, and the other way round.
    """
    from gracec.evaluate import load_samples
    from gracec.reporting import write_report_page

    samples = load_samples(data, limit) if data is not None else []
    target = write_report_page(artifacts, output, samples)
    out.print(f"wrote {target}", markup=False, highlight=False, soft_wrap=True)


@command
def doctor(
    model: Annotated[
        str, typer.Argument(help="Anything that may be a model: a directory, or org/name.")
    ],
    recipe: Annotated[str, typer.Option(help="The recipe that has to be open.")] = "w4a16-ptq",
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Say what of a model can be compiled, and what blocks where. Exit code 1 if anything does."""
    from gracec.doctor import Check, diagnose

    def show(check: Check) -> None:
        if not as_json and not is_quiet():
            typer.echo(check.line())

    found = diagnose(model, recipe, show, revision=revision, device=device, dtype=dtype)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(found.verdict())
    if not found.compiles:
        raise typer.Exit(1)


def show_plan(plan: Any) -> None:
    """A `TrainingPlan`, for people."""
    print_lines(plan.head())
    out.print(plan.bytes_table())
    print_lines(plan.verdict())
    if plan.settings:
        out.print(plan.settings_table())


def print_lines(lines: Iterable[Any]) -> None:
    """Plain lines; empty ones are left out."""
    for line in filter(None, map(str, lines)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _with_onnx(recipe: str, formats: str, target: str | None, **options: str | None) -> Any:
    """The recipe that is named, with what the command line says of ONNX graphs.

    Raises:
        GracecError: if no graphs are written.
    """
    from gracec.backends.base import parse_formats
    from gracec.backends.onnx.format import Onnx
    from gracec.errors import GracecError
    from gracec.recipe import Recipe
    from gracec.targets import target_named
    from gracec.targets.onnxruntime import OnnxRuntime

    given = [name for name, value in options.items() if value is not None]
    if not given:
        return recipe
    written = any(isinstance(form, Onnx) for form in parse_formats(formats))
    if not written and not isinstance(target_named(target), OnnxRuntime):
        raise GracecError(
            "no ONNX graphs are written, so it would be ignored",
            where=f"--{given[0]}",
            fix="add --format onnx, or --target onnxruntime",
        )
    return Recipe.load(recipe).with_onnx(**options)


def _recipe_of(report: Any) -> Any:
    from gracec.recipe import Recipe

    return Recipe.from_dict(dict(report.recipe))
