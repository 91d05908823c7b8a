"""Commands that ask a model: `run`, `serve`, `eval` and `demo`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from gracec.cli.app import (
    MOST_AT_ONCE,
    MOST_QUESTIONS,
    MOST_TOKENS,
    Device,
    Dtype,
    Json,
    ModelName,
    Revision,
    TargetName,
    WithNames,
    app,
    err,
    out,
    print_json,
    text,
)


@app.command(cls=WithNames)
def run(
    model: ModelName,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer.")
    ] = 64,
    target: TargetName = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask a model one question about one picture; the answer appears word by word."""
    from transformers import TextStreamer

    from gracec.evaluate import answer, load_image

    text(prompt, "--prompt")
    picture = load_image(image)
    loaded, processor, _ = _load(model, target, revision, device, dtype)
    streamer = None
    if not as_json:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    said = answer(
        loaded, processor, picture, prompt, max_new_tokens=max_new_tokens, streamer=streamer
    )
    if as_json:
        print_json({"model": str(model), "image": str(image), "prompt": prompt, "answer": said})


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
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name of this machine to answer to; several times for more."),
    ] = None,
) -> None:
    """Let a browser on this machine run a model: serve it and a page that asks it about images."""
    from gracec.serve import Server

    with Server(model, page, host, port, allow_host or ()) as server:
        typer.echo(f"{server.url} (Ctrl+C ends it)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


@app.command(cls=WithNames)
def eval(
    model: ModelName,
    data: Annotated[Path, typer.Option(help="Folder with samples.jsonl and its images.")],
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_QUESTIONS, help="Use an even spread of samples.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_AT_ONCE)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS)] = 8,
    blind: Annotated[bool, typer.Option(help="Also ask without the image.")] = True,
    target: TargetName = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Accuracy by type of question, beside the blind, majority and chance rates."""
    from gracec.evaluate import evaluate_vqa, format_table, load_samples

    samples = load_samples(data, limit)
    loaded, processor, name = _load(model, target, revision, device, dtype)
    with Progress(console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(name, total=len(samples))
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
        print_json({"model": str(model), "data": str(data), **report.to_dict()})
    else:
        out.print(format_table({name: report}))


@app.command()
def demo(
    example: Annotated[Path, typer.Option(help="Example with teacher, student and data.")] = Path(
        "examples/emojivqa"
    ),
    output: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")] = Path(
        "out/demo"
    ),
    limit: Annotated[
        int, typer.Option(min=1, max=MOST_QUESTIONS, help="Questions to ask each model.")
    ] = 2000,
    as_json: Json = False,
) -> None:
    """Compile the shipped student, and let teacher, student and INT4 student answer questions."""
    from gracec.demo import run_demo

    result = run_demo(example, output, limit=limit, console=err if as_json else out)
    if as_json:
        print_json(result)


def _load(
    model: str,
    target: str | None,
    revision: str | None,
    device: str | None,
    dtype: str | None,
) -> tuple[Any, Any, str]:
    """A model that generates, its processor and its name, from an artifact or of Hugging Face."""
    import gracec
    from gracec.models.devices import device_named, dtype_named
    from gracec.models.hub import find_artifact, find_description, find_model
    from gracec.models.loading import load_model, load_processor
    from gracec.store import is_artifact
    from gracec.targets.base import target_named

    where, precision = device_named(device), dtype_named(dtype)
    place = find_description(model, revision)
    if target is not None or is_artifact(place.path):
        onnx = target_named(target).reads
        place = find_artifact(model, revision, onnx=onnx)
        loaded: Any = gracec.load(place.path, target, device=where, dtype=precision)
        return loaded, loaded.processor, place.name
    place = find_model(model, revision)
    return load_model(place.path, precision, where), load_processor(place.path), place.name
