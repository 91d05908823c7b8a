"""Visual question answering by exact match, beside the controls that give the figure a meaning.

Each accuracy comes with its standard error and with three controls: `blind` (the same questions
with the image zeroed after normalisation), `majority` (always the most frequent answer of the type)
and `chance` (any answer of the type). The overall row is the micro average; its majority and chance
are those of a guesser who knows the type of each question.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from rich import box
from rich.table import Table
from torch import Tensor

from gracec.errors import GracecError, first_line
from gracec.evaluate.data import VqaSample, load_image

Progress = Callable[[int, int], None]
PIXELS = "pixel_values"


class Generator(Protocol):
    """What is evaluated: a Hugging Face model, or anything that generates like one."""

    @property
    def device(self) -> Any: ...

    @property
    def generate(self) -> Callable[..., Any]:
        """Returns the prompt's tokens followed by the new ones."""


@dataclass(frozen=True)
class VqaScore:
    """The figures of one type of question; shares between 0 and 1."""

    n: int
    accuracy: float
    standard_error: float
    chance: float
    majority: float
    blind_accuracy: float | None
    blind_standard_error: float | None


@dataclass(frozen=True)
class Prediction:
    """What was generated for one sample; `blind` is the answer without the image."""

    index: int
    type: str
    predicted: str
    answer: str
    correct: bool
    blind: str | None = None


@dataclass(frozen=True)
class VqaReport:
    """Scores by type, in the order in which the types appear, and over all samples."""

    overall: VqaScore
    types: Mapping[str, VqaScore]
    predictions: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "overall": asdict(self.overall),
            "types": {name: asdict(score) for name, score in self.types.items()},
            "predictions": [asdict(prediction) for prediction in self.predictions],
        }


class PairedDifference(NamedTuple):
    """Mean difference in accuracy over the same samples, and its standard error."""

    difference: float
    standard_error: float


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end."""
    text = " ".join(text.lower().split())
    return re.sub(f"[{re.escape(string.punctuation)}\\s]+$", "", text) or text


def evaluate_vqa(
    model: Generator,
    processor: Any,
    samples: Sequence[VqaSample],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    blind: bool = True,
    progress: Progress | None = None,
) -> VqaReport:
    """Ask every question once, greedily, and once more without the image.

    Args:
        model: has `generate(**inputs, ...)` and `device`.
        processor: of the model; its chat template builds the prompt, or "<image>\\nquestion" does.
        samples: the questions.
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
    with _inference(model):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            images = [load_image(sample.image) for sample in batch]
            names = [f"sample {start + offset}" for offset in range(len(batch))]
            questions = [sample.question for sample in batch]
            inputs = _prepare(model, processor, questions, images, names, tokens_by_size)
            answers = _generate(model, processor, inputs, max_new_tokens)
            blind_answers: Sequence[str | None] = [None] * len(batch)
            if blind:
                blind_answers = _generate(model, processor, _without_image(inputs), max_new_tokens)
            predictions += [
                Prediction(
                    index=start + offset,
                    type=sample.type,
                    predicted=answer,
                    answer=sample.answer,
                    correct=_matches(answer, sample.answer),
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
    image: Image.Image,
    question: str,
    *,
    max_new_tokens: int = 64,
    streamer: Any = None,
) -> str:
    """The greedy answer to one question about one image.

    Args:
        streamer: is given the tokens as they come, as streamers of transformers are.
    """
    try:
        inputs = encode(processor, [question], [image])
    except ValueError as error:
        reason = first_line(error)
        raise GracecError(f"the processor refuses the question ({reason})") from error
    with _inference(model):
        return _generate(model, processor, _place(inputs, model), max_new_tokens, streamer)[0]


def answers(
    model: Generator,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image],
    *,
    names: Sequence[str],
    tokens_by_size: dict[tuple[int, int], int],
    max_new_tokens: int = 64,
) -> list[str]:
    """The greedy answers to a batch of questions, asked and checked as `evaluate_vqa` does.

    Args:
        model: has `generate(**inputs, ...)` and `device`.
        processor: of the model.
        questions: what to ask, about one image each.
        images: as `load_image` gives them.
        names: what to call each question in an error.
        tokens_by_size: empty at first, then the same for each batch: image size -> image tokens.
        max_new_tokens: the longest answer.
    """
    with _inference(model):
        inputs = _prepare(model, processor, questions, images, names, tokens_by_size)
        return _generate(model, processor, inputs, max_new_tokens)


def summarise(predictions: Sequence[Prediction]) -> VqaReport:
    """The report of a list of predictions."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.type, []).append(prediction)
    types = {name: _score(group) for name, group in groups.items()}
    chance = sum(score.n * score.chance for score in types.values()) / len(predictions)
    majority = sum(score.n * score.majority for score in types.values()) / len(predictions)
    return VqaReport(
        overall=_score(predictions, chance=chance, majority=majority),
        types=types,
        predictions=tuple(predictions),
    )


def paired_difference(a: VqaReport, b: VqaReport) -> PairedDifference:
    """How much more accurate `a` is than `b`, both over the same samples.

    The standard error is that of the mean of the per-sample differences, which leaves out how hard
    the questions are; like the binomial one it divides by n.
    """
    if _sample_keys(a) != _sample_keys(b):
        raise GracecError(
            "the two reports are not over the same samples",
            fix="evaluate both models on one list of samples",
        )
    differences = [
        int(left.correct) - int(right.correct)
        for left, right in zip(a.predictions, b.predictions, strict=True)
    ]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / n
    return PairedDifference(mean, math.sqrt(variance / n))


def format_table(reports: Mapping[str, VqaReport]) -> Table:
    """One row a type, one column a model ("59.1 ±0.8", per cent), and the controls beside them.

    With several models `blind` is that of the model which guesses best without the image.
    """
    if not reports:
        raise GracecError("no reports to show")
    first = next(iter(reports.values()))
    for name, report in reports.items():
        if _sample_keys(report) != _sample_keys(first):
            raise GracecError(
                "the report is not over the same samples as the first one",
                where=name,
                fix="evaluate all models on one list of samples",
            )
    caption = "blind: the best of the models" if len(reports) > 1 else None
    # No frame: three models and their controls fit into 80 columns.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("type")
    table.add_column("n", justify="right")
    for name in (*reports, "blind"):
        # A narrow terminal breaks the name, never the figure.
        table.add_column(name, justify="right", min_width=len("59.1 ±0.8"))
    table.add_column("majority", justify="right")
    table.add_column("chance", justify="right")
    for name in first.types:
        table.add_row(name, *_cells([report.types[name] for report in reports.values()]))
    table.add_section()
    table.add_row("overall", *_cells([report.overall for report in reports.values()]))
    return table


def _cells(scores: Sequence[VqaScore]) -> list[str]:
    blind = max(
        scores, key=lambda score: -1.0 if score.blind_accuracy is None else score.blind_accuracy
    )
    return [
        str(scores[0].n),
        *(_percent(score.accuracy, score.standard_error) for score in scores),
        _percent(blind.blind_accuracy, blind.blind_standard_error),
        _percent(scores[0].majority),
        _percent(scores[0].chance),
    ]


def _percent(share: float | None, error: float | None = None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ±{100 * error:.1f}"


def accuracy_rows(original: VqaReport, compiled: VqaReport, data: str) -> dict[str, Any]:
    """Scores of both models and their paired difference, JSON-able and without the answers."""
    scores = {
        name: {"overall": asdict(r.overall), "types": {t: asdict(s) for t, s in r.types.items()}}
        for name, r in (("original", original), ("compiled", compiled))
    }
    difference = paired_difference(compiled, original)._asdict()
    return {"data": data, **scores, "difference": difference}


def _sample_keys(report: VqaReport) -> list[tuple[int, str, str]]:
    return [(one.index, one.type, one.answer) for one in report.predictions]


def _matches(predicted: str, answer: str) -> bool:
    return normalise_answer(predicted) == normalise_answer(answer)


def _score(
    group: Sequence[Prediction], chance: float | None = None, majority: float | None = None
) -> VqaScore:
    n = len(group)
    answers = Counter(normalise_answer(one.answer) for one in group)
    accuracy = sum(one.correct for one in group) / n
    blind = [_matches(one.blind, one.answer) for one in group if one.blind is not None]
    blind_accuracy = sum(blind) / n if len(blind) == n else None
    return VqaScore(
        n=n,
        accuracy=accuracy,
        standard_error=_binomial_error(accuracy, n),
        chance=1 / len(answers) if chance is None else chance,
        majority=max(answers.values()) / n if majority is None else majority,
        blind_accuracy=blind_accuracy,
        blind_standard_error=None if blind_accuracy is None else _binomial_error(blind_accuracy, n),
    )


def _binomial_error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)


@contextmanager
def _inference(model: Any) -> Iterator[None]:
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
    questions: Sequence[str],
    images: Sequence[Image.Image],
    names: Sequence[str],
    tokens_by_size: dict[tuple[int, int], int],
) -> dict[str, Any]:
    """Prompts and pixels of a batch on the model's device, with all of their image tokens."""
    inputs = _encode(processor, questions, images, names)
    _check_image_tokens(processor, inputs["input_ids"], images, names, tokens_by_size)
    return _place(inputs, model)


def _encode(
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image],
    names: Sequence[str],
) -> dict[str, Any]:
    """Prompts and pixels of a batch; an error names the first sample that fails by itself."""
    try:
        return encode(processor, questions, images)
    except ValueError as error:
        for name, question, image in zip(names, questions, images, strict=True):
            try:
                encode(processor, [question], [image])
            except ValueError as own:
                raise GracecError(
                    f"the processor refuses the sample ({first_line(own)})", where=name
                ) from own
        raise GracecError(
            f"the processor refuses the batch ({first_line(error)})",
            where=f"{names[0]} to {names[-1]}",
        ) from error


def encode(
    processor: Any, questions: Sequence[str], images: Sequence[Image.Image]
) -> dict[str, Any]:
    """What the model takes for some questions, one image each, padded on the left."""
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if getattr(processor, "chat_template", None):
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for question, image in zip(questions, images, strict=True)
        ]
        # Tokenized in the same call: it knows whether the template has written the first token.
        encoded = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",  # SmolVLM does not look for it among the options
            processor_kwargs=options,
        )
    else:
        texts = [f"{_image_token(processor)}\n{question}" for question in questions]
        encoded = processor(images=[[image] for image in images], text=texts, **options)
    return {name: value for name, value in encoded.items() if name != "labels"}


def _image_token(processor: Any) -> str:
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise GracecError(
            f"{type(processor).__name__} has neither a chat template nor an image token",
            fix="set processor.chat_template",
        )
    return token


def _check_image_tokens(
    processor: Any,
    input_ids: Tensor,
    images: Sequence[Image.Image],
    names: Sequence[str],
    tokens_by_size: dict[tuple[int, int], int],
) -> None:
    """Images of one size have one number of placeholders; a prompt with fewer was cut.

    Some families take more tokens for a larger image, so that the number is compared by size.
    `tokens_by_size` holds the largest seen so far.
    """
    token_id = getattr(processor, "image_token_id", None)
    if token_id is None:
        token_id = processor.tokenizer.convert_tokens_to_ids(_image_token(processor))
    counts = (input_ids == token_id).sum(dim=1).tolist()
    for count, image in zip(counts, images, strict=True):
        tokens_by_size[image.size] = max(count, tokens_by_size.get(image.size, 0))
    for name, count, image in zip(names, counts, images, strict=True):
        expected = tokens_by_size[image.size]
        if count == 0 or count != expected:
            raise GracecError(
                f"the prompt has {count} image tokens where {expected or 'some'} are expected",
                where=name,
                fix="do not let the processor truncate",
            )


def _place(inputs: Mapping[str, Any], model: Generator) -> dict[str, Any]:
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


def _generate(
    model: Generator,
    processor: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    streamer: Any = None,
) -> list[str]:
    prompt: Tensor = inputs["input_ids"]
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if streamer is not None:
        settings["streamer"] = streamer
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
    length = prompt.shape[1]
    if not torch.equal(tokens[:, :length], prompt):
        raise GracecError(
            "generate() does not return the prompt followed by the new tokens",
            where=type(model).__name__,
        )
    decoded: list[str] = processor.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return [text.strip() for text in decoded]
