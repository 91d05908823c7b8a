"""Ask a model questions about an image or none: one, a batch, or all of a set, seeing and blind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from gracec.data.answers import stop_tokens
from gracec.data.pictures import as_loaded
from gracec.data.prompts import Message, Prompts, encode_questions, images_of, question_about
from gracec.data.taught import Reply
from gracec.errors import GracecError, first_line
from gracec.evaluate.references import Question, asked
from gracec.evaluate.scores import Prediction, VqaReport, same_answer, summarise

Progress = Callable[[int, int], None]


PIXELS = "pixel_values"
# What models raise for inputs, or for settings of generation, that they do not take.
_FAILURES = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError)


class Generator(Protocol):
    """What is evaluated: a Hugging Face model, or anything that generates like one."""

    @property
    def device(self) -> Any: ...

    @property
    def generate(self) -> Callable[..., Any]:
        """Returns the prompt's tokens followed by the new ones."""


def evaluate_vqa(
    model: Generator,
    processor: Any,
    samples: Sequence[Question],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    blind: bool = True,
    progress: Progress | None = None,
) -> VqaReport:
    """Ask every question once, greedily, and once more without the image, if it has one.

    Args:
        model: has `generate(**inputs, ...)` and `device`.
        processor: of the model; its chat template builds the prompt, or "<image>\\nquestion" does.
        samples: the questions, or references: conversations without their last answer.
        batch_size: questions a batch, padded on the left.
        max_new_tokens: the longest answer.
        blind: whether to run the control without the image (twice the time).
        progress: called with (done, total) after each batch.
    """
    if not samples:
        raise GracecError("no samples to evaluate")
    if batch_size < 1 or max_new_tokens < 1:
        raise GracecError("batch_size and max_new_tokens must be at least 1")
    predictions: list[Prediction] = []
    tokens_by_size: dict[tuple[int, int], int] = {}
    with inference(model):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            names = [f"sample {start + offset}" for offset in range(len(batch))]
            messages = [asked(sample) for sample in batch]
            inputs = _prepare(model, processor, messages, names, tokens_by_size)
            settings = {"max_new_tokens": max_new_tokens}
            answers = generate(model, processor, inputs, settings)
            blind_answers: Sequence[str | None] = [None] * len(batch)
            if blind and not any(map(images_of, messages)):
                blind_answers = answers
            elif blind:
                blind_answers = generate(model, processor, _without_image(inputs), settings)
            predictions += [
                Prediction(
                    index=start + offset,
                    type=sample.type,
                    predicted=answer,
                    answer=sample.answer,
                    correct=same_answer(answer, sample.answer),
                    blind=blind_answer,
                )
                for offset, (sample, answer, blind_answer) in enumerate(
                    zip(batch, answers, blind_answers, strict=True)
                )
            ]
            if progress is not None:
                progress(len(predictions), len(samples))
    return summarise(predictions)


def answer(
    model: Generator,
    processor: Any,
    image: Image.Image | None,
    question: str,
    *,
    max_new_tokens: int = 64,
    streamer: Any = None,
) -> str:
    """The greedy answer to one question about one image or none.

    Args:
        image: as Pillow opened it, or as `load_image` did.
        streamer: is given the tokens as they come, as streamers of transformers are.
    """
    picture = None if image is None else as_loaded(image, "the question")
    inputs = encode_questions(processor, [question], [picture], ["the question"])
    with inference(model):
        settings = {"max_new_tokens": max_new_tokens}
        return generate(model, processor, place(inputs, model), settings, streamer)[0]


def answers(
    model: Generator,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image | None],
    *,
    names: Sequence[str],
    tokens_by_size: dict[tuple[int, int], int],
    max_new_tokens: int = 64,
) -> list[str]:
    """The greedy answers to a batch of questions, asked and checked as `evaluate_vqa` does.

    Args:
        model: has `generate(**inputs, ...)` and `device`.
        processor: of the model.
        questions: what to ask, about one image each or none.
        images: as `load_image` gives them; None for none.
        names: what to call each question in an error.
        tokens_by_size: empty at first, then the same for each batch: image size -> image tokens.
        max_new_tokens: the longest answer.
    """
    with inference(model):
        messages = [question_about(*pair) for pair in zip(images, questions, strict=True)]
        inputs = _prepare(model, processor, messages, names, tokens_by_size)
        return generate(model, processor, inputs, {"max_new_tokens": max_new_tokens})


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Dropout off, as generating needs it; the model is put back as it was."""
    training = bool(getattr(model, "training", False))
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()


def _prepare(
    model: Generator,
    processor: Any,
    conversations: Sequence[Sequence[Message]],
    names: Sequence[str],
    tokens_by_size: dict[tuple[int, int], int],
) -> dict[str, Any]:
    """Prompts and pixels of a batch on the model's device, with all of their image tokens."""
    inputs = Prompts(processor).encode(
        conversations, names, padding_side="left", generation_prompt=True
    )
    images = [images_of(messages) for messages in conversations]
    _check_image_tokens(processor, inputs["input_ids"], images, names, tokens_by_size)
    return place(inputs, model)


def _check_image_tokens(
    processor: Any,
    input_ids: Tensor,
    images: Sequence[Sequence[Image.Image]],
    names: Sequence[str],
    tokens_by_size: dict[tuple[int, int], int],
) -> None:
    """Images of one size have one number of placeholders; a prompt with fewer was cut.

    Some families take more tokens for a larger image, so that the number is compared by size.
    `tokens_by_size` holds the largest seen so far.
    """
    counts = (input_ids == Prompts(processor).image_id).sum(dim=1).tolist()
    pictured = [one for one in zip(names, counts, images, strict=True) if one[2]]
    for _, count, own in pictured:
        if len(own) == 1:
            tokens_by_size[own[0].size] = max(count, tokens_by_size.get(own[0].size, 0))
    for name, count, own in pictured:
        # Of several images it is not known how many are of which.
        expected = tokens_by_size[own[0].size] if len(own) == 1 else count
        if count == 0 or count != expected:
            raise GracecError(
                f"the prompt has {count} image tokens where {expected or 'some'} are expected",
                where=name,
                fix="do not let the processor truncate",
            )


def place(inputs: Mapping[str, Any], model: Generator) -> dict[str, Any]:
    """On the model's device; floating-point inputs in its dtype."""
    dtype = getattr(model, "dtype", None)
    placed = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(model.device)
            if value.is_floating_point() and dtype is not None:
                value = value.to(dtype)
        placed[name] = value
    return placed


def _without_image(inputs: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(inputs.get(PIXELS), Tensor):
        raise GracecError(f"the processor returns no {PIXELS} to blank", fix="pass blind=False")
    pixels = inputs[PIXELS]
    blank = torch.zeros_like(pixels)
    if pixels.dim() == 5:  # several images a prompt, where one of zeros is padding
        real = pixels.flatten(2).any(-1)[..., None, None, None]
        blank = blank.masked_fill(real, torch.finfo(pixels.dtype).tiny)
    return {**inputs, PIXELS: blank}


def generate(
    model: Generator,
    processor: Any,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    streamer: Any = None,
) -> list[str]:
    """The new text of each prompt, by `generate` of the model; greedy where nothing else is set.

    Raises:
        GracecError: if the model does not take the inputs or the settings.
    """
    tokens = _new_tokens(model, inputs, {**settings, "streamer": streamer})
    decoded: list[str] = processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in decoded]


def replies(
    model: Any,
    processor: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    names: Sequence[str],
    max_new_tokens: int,
    positions: int,
) -> list[Reply]:
    """The greedy answers to a batch of conversations that each end with a question.

    Args:
        model: a Hugging Face model.
        names: what to call each in an error.
        max_new_tokens: the longest answer; one that has not ended there is not complete.
        positions: tokens that the model takes, prompt and answer together.

    Raises:
        GracecError: if the processor or the model refuses one, or it leaves no place for an answer.
    """
    encoded = Prompts(processor).encode(
        conversations, names, padding_side="left", generation_prompt=True
    )
    room = min(max_new_tokens, positions - encoded["input_ids"].shape[1])
    if room < 1:
        raise GracecError(
            f"the prompt leaves no place for an answer in {positions} tokens", where=names[0]
        )
    stops = stop_tokens(model, processor)
    settings = {"max_new_tokens": room, "pad_token_id": stops[0]}
    with inference(model):
        tokens = _new_tokens(model, place(encoded, model), settings)
    found = []
    for row in tokens.tolist():
        end = next((at for at, token in enumerate(row) if token in stops), None)
        text = processor.batch_decode([row[:end]], skip_special_tokens=True)[0]
        found.append(Reply(str(text).strip(), len(row[:end]), end is not None))
    return found


def _new_tokens(model: Generator, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor:
    """int64 [B, N]: what a model generates after a prompt; greedily where nothing else is set."""
    prompt: Tensor = inputs["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    options |= {name: value for name, value in settings.items() if value is not None}
    try:
        tokens = model.generate(**inputs, **options)
    except _FAILURES as error:
        raise GracecError(
            f"the model does not take what its processor made ({first_line(error)})",
            where=type(model).__name__,
            fix="check that config.json, generation_config.json and the processor belong together",
        ) from error
    length = prompt.shape[1]
    if not torch.equal(tokens[:, :length], prompt):
        raise GracecError(
            "generate() does not return the prompt followed by the new tokens",
            where=type(model).__name__,
        )
    found: Tensor = tokens[:, length:]
    return found
