"""Commands that ask a model: `run`, `serve`, `eval` and `demo`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from gracec.cli.app import (
    MOST_AT_ONCE,
    MOST_QUESTIONS,
    MOST_TOKENS,
    Device,
    Dtype,
    Json,
    ModelName,
    Revision,
    RunnerName,
    command,
    err,
    out,
    print_json,
    text,
)
from gracec.cli.logs import is_quiet


@command
def run(
    model: ModelName,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture to ask about; several times for more.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The question. Without it: a conversation, from the terminal or a pipe."),
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told before.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer.")
    ] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Draw the words; 0, or none of these: do not.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw of the likeliest, up to this sum.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw of so many of the likeliest.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Answers that are followed at once.")] = 1,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="Above 1: repeat less. By default the model's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn.")] = None,
    target: RunnerName = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask a model about pictures, or about none; the answer appears word by word.

    In a conversation: /image PATH adds a picture to the next question, /reset forgets what was
    said, /quit or Ctrl-D ends. From a pipe each line is a question. With --json an answer is an
    object; those of a conversation are one a line.
    """
    from transformers import TextStreamer, set_seed

    from gracec.cli.conversing import answer_one, converse
    from gracec.compiled import open_model
    from gracec.evaluate import Chat, load_image

    for value, option in ((prompt or "", "--prompt"), (system, "--system")):
        text(value, option)
    images = image or []
    for path in images:
        load_image(path)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in drawn.items() if value is not None}
    if given and temperature != 0:
        settings |= {"do_sample": True, **given}
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    loaded, processor = open_model(model, target, revision=revision, device=device, dtype=dtype)
    _say_what_runs(loaded, model, target)
    if seed is not None:  # loading draws as well
        set_seed(seed)
    streamer = None
    if not as_json and num_beams == 1:  # beams are not known before the end
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    chat = Chat(loaded, processor, system=system, settings=settings)
    if prompt is None:
        converse(chat, images, streamer, as_json)
    else:
        answer_one(chat, prompt, images, streamer, as_json, model=str(model))


@command
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


@command
def eval(
    model: ModelName,
    data: Annotated[
        str,
        typer.Option(
            help="Questions with answers: a folder with samples.jsonl and its images, or what "
            "`compile --data` takes; the last answer of a conversation is the one expected."
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_QUESTIONS, help="Use an even spread of samples.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_AT_ONCE)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS)] = 8,
    blind: Annotated[bool, typer.Option(help="Also ask without the image.")] = True,
    target: RunnerName = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Accuracy by type of question, beside the blind, majority and chance rates."""
    from gracec.compiled import open_model
    from gracec.evaluate import evaluate_vqa, format_table, load_questions
    from gracec.models.hub import name_of
    from gracec.training.progress import bar

    samples, skipped = load_questions(data, limit)
    loaded, processor = open_model(model, target, revision=revision, device=device, dtype=dtype)
    _say_what_runs(loaded, model, target)
    name = name_of(model)
    with bar(err, not is_quiet() and err.is_terminal) as progress:
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
        found = {"model": str(model), "data": str(data), "skipped": skipped}
        print_json({**found, **report.to_dict()})
    else:
        out.print(format_table({name: report}))


@command
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


def _say_what_runs(loaded: Any, model: str, target: str | None) -> None:
    """Which target was taken of an artifact, where none was named."""
    from gracec.compiled import CompiledModel
    from gracec.targets import AUTO

    if target not in (None, AUTO) or is_quiet():
        return
    if hasattr(loaded, "session_config"):
        mode = loaded.session_config.mode
        said = f"onnxruntime runs the graphs of {model}, mode {mode}; --target torchao its codes"
    elif isinstance(loaded, CompiledModel):
        said = f"torchao runs the codes of {model}"
    else:
        return  # a model as it came
    err.print(said, markup=False)
