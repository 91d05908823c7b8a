"""Train a prepared student: data, teacher, programs and directory, put together for the loop."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.capture import capture, family_of
from gracec.errors import GracecError
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.base import Pass
from gracec.passes.insert_taps import InsertTaps
from gracec.passes.select_supervised import SelectSupervised
from gracec.program import Program
from gracec.recipe import Recipe, Training
from gracec.training.checkpoint import (
    Fingerprint,
    describe_device,
    fingerprint_of_json,
    fingerprint_of_tensors,
)
from gracec.training.collate import Collator, EmptyBatch
from gracec.training.data import TrainData, open_train_data
from gracec.training.log import training_log
from gracec.training.loop import Batch, Curve, Learner, train

CALIBRATION_SAMPLES = 128


def train_student(
    prepared: Program,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    recipe: Recipe,
    processor: Any,
    train_data: Any,
    eval_data: Any = None,
    *,
    directory: Path | None = None,
    resume: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> Curve:
    """Train the weights and scales of `prepared`, which are those of `model`, in place.

    Args:
        prepared: the student, fake-quantized where the recipe says so.
        teacher: or None where the recipe needs none.
        train_data, eval_data: what `open_train_data` takes; without `eval_data` a part of the
            former chooses the best state.
        directory: for checkpoints and metrics.

    Raises:
        GracecError: if data, teacher and student do not fit together.
    """
    rule = recipe.training
    assert rule is not None
    if processor is None:
        raise GracecError("training needs the model's processor", fix="pass processor=")
    join_ranks()
    taps = _taps(rule)
    student = Learner(run_passes(prepared, taps).program, model)
    taught = None
    if rule.distillation.needs_teacher:
        assert teacher is not None
        check_teacher(model, teacher)
        passes = [AnalyzeModality(), *taps]
        taught = Learner(run_passes(capture(teacher), passes).program, teacher)
    data, held_out = _data(train_data, eval_data, rule, strict)
    collate = Collator(processor, model, rule.max_length, strict)
    fingerprint = None
    if directory is not None:
        fingerprint = _fingerprint(
            model, taught.model if taught else None, data, held_out, processor, recipe
        )
    if rank() == 0 and directory is not None and not resume:
        _refuse_leftovers(directory)
    with training_log(directory, rule, len(data), progress and rank() == 0) as log:
        curve = train(
            student,
            taught,
            lambda numbers: collate([data.sample(number) for number in numbers]),
            len(data),
            _Batches(held_out, collate, rule.micro_batch_size),
            rule,
            fingerprint=fingerprint,
            directory=directory,
            resume=resume,
            log=log,
        )
    curve.notes[:0] = [*data.problems, *held_out.problems, *collate.problems]
    return curve


def calibration_samples(
    model: PreTrainedModel,
    recipe: Recipe,
    processor: Any,
    train_data: Any,
    eval_data: Any = None,
    strict: bool = False,
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Inputs of the graph to watch activations on, one sample each, so that nothing is padding.

    They are evenly spaced in what is trained on, or in all of `train_data` where nothing is.

    Returns:
        The inputs, and a line for each sample that could not be used.

    Raises:
        GracecError: if the data cannot be read or none of it can be used.
    """
    if processor is None:
        raise GracecError("calibration needs the model's processor", fix="pass processor=")
    if recipe.training is not None:
        data, _ = _data(train_data, eval_data, recipe.training, strict)
    else:
        data = open_train_data(train_data, strict=strict)
    length = recipe.training.max_length if recipe.training is not None else None
    collate = Collator(processor, model, length, strict)
    count = min(CALIBRATION_SAMPLES, len(data))
    found = []
    for number in range(count):
        with suppress(EmptyBatch):
            batch = collate([data.sample(number * len(data) // count)])
            inputs = family_of(model).prepare(model, batch)
            found.append({name: tensor.to(model.device) for name, tensor in inputs.items()})
    if not found:
        raise GracecError("no sample can be used to calibrate on", where="train_data")
    return found, [*data.problems, *collate.problems]


def join_ranks() -> None:
    """Join the other processes where `torchrun` started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """Number of this process among those that `torchrun` started; 0 alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that says something else with the same tokens. Its widths may differ.

    Raises:
        GracecError: naming what differs.
    """
    models = {"student": student, "teacher": teacher}
    batches = {name: family_of(m).example_batch(m, batch=1, images=1) for name, m in models.items()}
    configs = {name: m.config for name, m in models.items()}
    facts = {
        "the family": {name: c.model_type for name, c in configs.items()},
        "the vocabulary": {name: c.get_text_config().vocab_size for name, c in configs.items()},
        "the image token": {
            name: getattr(c, "image_token_id", None) for name, c in configs.items()
        },
        "the number of visual tokens": {
            name: family_of(m).image_tokens(m, batches[name])[0] for name, m in models.items()
        },
        "the size of an image": {
            name: tuple(batch["pixel_values"].shape[1:]) for name, batch in batches.items()
        },
    }
    for what, found in facts.items():
        if found["student"] != found["teacher"]:
            raise GracecError(
                f"{what} is {found['student']} for the student and {found['teacher']} for the "
                "teacher",
                where="teacher",
                fix="choose a teacher of the same family and tokenizer",
            )


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse processors that give other ids to the same text.

    Raises:
        GracecError: with the first token that differs.
    """
    vocabularies = [processor.tokenizer.get_vocab() for processor in (student, teacher)]
    differences = dict(vocabularies[0].items() ^ vocabularies[1].items())
    if differences:
        raise GracecError(
            f"student and teacher have different tokenizers: {min(differences)!r} differs",
            where="teacher",
            fix="choose a teacher with the student's tokenizer",
        )


def _taps(rule: Training) -> list[Pass]:
    taps: list[Pass] = [InsertTaps()] if rule.distillation.omega else []
    return [*taps, SelectSupervised()]


def _data(
    train_data: Any, eval_data: Any, rule: Training, strict: bool
) -> tuple[TrainData, TrainData]:
    data = open_train_data(train_data, strict=strict)
    if eval_data is not None:
        return data, open_train_data(eval_data, strict=strict)
    parts: tuple[TrainData, TrainData] = data.split(rule.held_out, rule.seed)
    return parts


@dataclass(frozen=True)
class _Batches:
    """All samples of some data in batches, made anew each time."""

    data: TrainData
    collate: Collator
    size: int

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.data), self.size):
            numbers = range(start, min(start + self.size, len(self.data)))
            with suppress(EmptyBatch):
                yield self.collate([self.data.sample(number) for number in numbers])


def _fingerprint(
    model: nn.Module,
    teacher: nn.Module | None,
    data: TrainData,
    held_out: TrainData,
    processor: Any,
    recipe: Recipe,
) -> Fingerprint:
    return Fingerprint(
        model=fingerprint_of_tensors(dict(model.named_parameters())),
        teacher=fingerprint_of_tensors(dict(teacher.named_parameters())) if teacher else "",
        data=fingerprint_of_json([data.fingerprint, held_out.fingerprint]),
        processor=fingerprint_of_json(json.loads(processor.to_json_string())),
        recipe=fingerprint_of_json(recipe.to_dict()),
        device=describe_device(next(model.parameters()).device),
    )


def _refuse_leftovers(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()):
        raise GracecError(
            "an earlier training was interrupted here",
            where=str(directory),
            fix="go on with resume=True (--resume), or remove it",
        )
