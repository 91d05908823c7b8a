"""train: a prepared model learns from data and from a teacher; another one comes out."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from gracec._memory import trim
from gracec.capture import capture
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.data.collate import Collator, EmptyBatch
from gracec.data.taught import TaughtSource
from gracec.errors import GracecError
from gracec.journal import Journal
from gracec.models.hub import Place, find_model
from gracec.models.loading import load_config, load_model, load_processor
from gracec.models.skeleton import model_without_weights
from gracec.passes.base import PipelineResult, run_passes
from gracec.passes.free_scales import FreeScales
from gracec.passes.freeze import SCALE_CODES, Freeze, frozen_weights, with_codes
from gracec.passes.pipeline import Pipeline
from gracec.passes.return_head import HEAD, ReturnHead
from gracec.quant.frozen import code_hash
from gracec.recipe import Recipe, Training
from gracec.report.report import sqnr_db
from gracec.request import Request
from gracec.stages.pipelines import ANALYSIS, learning
from gracec.stages.prepare import Prepared
from gracec.stages.source import Source
from gracec.training.checkpoints.fingerprint import (
    Fingerprint,
    describe_device,
    fingerprint_of_json,
    fingerprint_of_tensors,
)
from gracec.training.learner import LaterTeacher, Learner, Teacher
from gracec.training.loader import Batches, Loader, workers_of
from gracec.training.log import training_log
from gracec.training.loop import train as train_learner
from gracec.training.micro_batch import Batch
from gracec.training.ranks import join_ranks, rank
from gracec.training.samples import Samples, open_samples
from gracec.training.setup import precision_of
from gracec.training.teacher import (
    check_teacher,
    check_tokenizers,
    taught_ids,
    vocabulary_rows,
)
from gracec.training.teacher_cache import Part, cached_teacher, folder_of


def train(
    prepared: Prepared, request: Request, journal: Journal, *, inplace: bool = False
) -> Prepared:
    """Train weights and scales, or scales alone; what is given stays as it is, unless `inplace`.

    Scales alone start from the codes of the graph, or from those of the candidate. What calibration
    measured of its codes stays in the journal only if they are what is kept: of trained weights
    output errors are not measured.

    Returns:
        The model in its best state.

    Raises:
        GracecError: if data, teacher and student do not fit together.
    """
    rule, processor = request.training, prepared.source.processor
    assert rule is not None
    if processor is None:
        raise GracecError("training needs the model's processor", fix="pass processor=")
    join_ranks(prepared.model.device)
    journal.note("training", *_always_ddp(rule, strict=request.strict))
    taps = learning(rule, strict=request.strict)
    shape: PreTrainedModel | None = None
    if rule.distillation.needs_teacher:
        shape = teacher_shape(prepared.source, request)
        check_teacher(prepared.model, shape)
        journal.note("training", *_ignored_rows(prepared, shape))
    owned = prepared if inplace else prepared.owned()
    if rule.learns == "scales":
        owned = _with_free_scales(owned)
    journal.ptq_sqnr_db = sqnr_db(owned.program, owned.source.model)
    candidate = owned.candidate
    result = run_passes(owned.program, taps.placed(request.further)[0])
    journal.note("training", *_whole_logits("student", result))
    student = Learner(result.program, owned.model)
    collate = Collator(
        processor,
        owned.model,
        rule.max_length,
        request.strict,
        names_pictures=bool(rule.teacher_cache),
    )
    samples, held_out = open_samples(request.train_data, request.held_out, rule, collate)
    loading = _loading(rule, owned.model.device)
    directory, fingerprint = request.training_dir, None
    if directory is not None:
        fingerprint = _fingerprint(owned, (samples, held_out), request.recipe)

    def make() -> tuple[Teacher, str]:
        """The teacher, once the student holds no more than its rank needs."""
        teacher, told_by = _teacher(owned, request, taps, journal), ""
        if directory is not None or rule.teacher_cache:
            told_by = fingerprint_of_tensors(dict(teacher.model.named_parameters()))
        if not rule.teacher_cache:
            return teacher, told_by
        looked_up = (samples, held_out) if rule.chooses_by_teacher else (samples,)
        cached = cached_teacher(
            teacher,
            [Part.of(one, Loader(one, **loading), rule) for one in looked_up],
            rule,
            folder_of(rule.teacher_cache),
            fingerprint=told_by,
            processor=json.loads(processor.to_json_string()),
            progress=request.progress,
        )
        journal.note("training", *cached.notes)
        del teacher  # the head alone stays, if nobody else has it
        gc.collect()  # a graph and its nodes hold each other
        trim()
        return cached.teacher, told_by

    later = None if shape is None else LaterTeacher(make, _bytes_of(shape, rule))
    del shape
    if rule.precision == "auto" and owned.model.device.type != "cpu":
        dtype, device = str(precision_of(rule, owned.model.device)), owned.model.device.type
        journal.note(
            "training",
            f"matmuls compute in {dtype.removeprefix('torch.')}, which precision auto is on "
            f"{device}; weights, scales and the optimizer are in float32",
        )
    first = rank() == 0
    told = request.told if first else ()
    curve = train_learner(
        student,
        later,
        Loader(samples, **loading),
        len(samples),
        _Batches(Loader(held_out, **loading), len(held_out), rule.micro_batch_size),
        rule,
        candidate=candidate,
        fingerprint=fingerprint,
        directory=directory,
        resume=request.resume,
        log=training_log(rule, len(samples), request.progress and first, told),
    )
    one, other = samples.data, held_out.data
    said = (*one.notes, *other.notes, *one.problems, *other.problems, *collate.problems)
    said += tuple(collate.notes) if rule.micro_batch_size > 1 else ()
    journal.note("training", *said, *curve.notes)
    journal.training = curve.to_dict()
    if isinstance(request.train_data, TaughtSource):
        journal.training["answers"] = dict(request.train_data.summary)
    if journal.training["best_step"] != (0 if rule.learns == "scales" else None):
        journal.output_errors, journal.codes = {}, {}  # those of codes that were not kept
    return replace(owned, candidate=None)


def _with_free_scales(prepared: Prepared) -> Prepared:
    """The same with codes whose scales learn: those of the candidate, or of the graph."""
    program = with_codes(prepared.program, prepared.candidate or {})
    program = run_passes(program, [FreeScales()]).program
    return replace(prepared, program=program, candidate=None)


def find_teacher(request: Request, journal: Journal) -> Request:
    """The request with the place of a teacher that it names, before anything takes long.

    Raises:
        GracecError: if it is a repository that cannot be had.
    """
    if not isinstance(request.teacher, (str, Path)):
        return request
    place = find_model(request.teacher, request.teacher_revision)
    load_config(place.path)
    journal.note("", *place.note("the teacher is"))
    return replace(request, teacher=place)


def teacher_shape(source: Source, request: Request) -> PreTrainedModel:
    """The teacher, but of one in a directory no weight is read: for looking at before it is loaded.

    Raises:
        GracecError: if it has no usable configuration, or another tokenizer.
    """
    teacher = request.teacher
    if isinstance(teacher, (str, Path, Place)):
        path = find_model(teacher, request.teacher_revision).path
        check_tokenizers(source.processor, load_processor(path))
        return model_without_weights(path, device=source.model.device)
    return source.model if teacher is None else teacher


def teacher_of(source: Source, request: Request) -> PreTrainedModel:
    """The teacher as a model; by default the original itself, which training does not touch.

    Raises:
        GracecError: if it cannot be loaded.
    """
    teacher = request.teacher
    if isinstance(teacher, (str, Path, Place)):
        path = find_model(teacher, request.teacher_revision).path
        teacher = load_model(path, device=source.model.device)
    found: PreTrainedModel = source.model if teacher is None else teacher
    found.eval()
    return found


def _teacher(prepared: Prepared, request: Request, taps: Pipeline, journal: Journal) -> Learner:
    """The teacher as a graph; by default the original itself, which training does not touch."""
    found = teacher_of(prepared.source, request)
    ids = taught_ids(prepared.model, found, prepared.source.processor)
    program = run_passes(capture(found), ANALYSIS).program
    blocks_equal_hidden_states(program, found)
    result = run_passes(program, taps)
    owned = found is not prepared.source.model and found is not request.teacher
    teacher = Learner(result.program, found, ids, owned=owned)
    journal.note("training", *_whole_logits("teacher", result))
    return teacher


def _whole_logits(whose: str, result: PipelineResult) -> list[str]:
    """What is said of a model whose head cannot be computed in chunks."""
    if HEAD in result.program.output_names:
        return []
    return [f"{whose}: {note.text}" for note in result.notes if note.source == ReturnHead.name]


def _bytes_of(teacher: PreTrainedModel, rule: Training) -> int:
    """What a teacher holds in memory; of one in files its head alone stays there."""
    head = teacher.get_output_embeddings() if rule.teacher_cache else None
    held = teacher if head is None else head
    return sum(parameter.nbytes for parameter in held.parameters())


def _always_ddp(rule: Training, *, strict: bool) -> list[str]:
    """What is said where several processes cannot share out what they hold.

    Raises:
        GracecError: in strict mode, unless the recipe asks for it.
    """
    if not rule.compile or rule.strategy != "auto" or _ranks() == 1:
        return []
    said = "compile: true trains by DDP, each process with the whole of student and teacher"
    if strict:
        raise GracecError(
            said, where="training.strategy", fix="say strategy: ddp, or leave compile out"
        )
    return [said]


def _ignored_rows(prepared: Prepared, teacher: PreTrainedModel) -> list[str]:
    """What is said of models that pad their vocabulary to different sizes.

    Raises:
        GracecError: if the teacher has no row for a token of the student's.
    """
    ids = taught_ids(prepared.model, teacher, prepared.source.processor)
    if ids is None:
        return []
    own, other = (vocabulary_rows(model) - ids for model in (prepared.model, teacher))
    return [
        f"distilled over the {ids:,} ids of the tokenizer; {own:,} rows of the student and "
        f"{other:,} of the teacher beyond are ignored"
    ]


@dataclass(frozen=True)
class _Batches:
    """All samples of some data in batches, made anew each time."""

    batches: Batches
    samples: int
    size: int

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, self.samples, self.size)
        groups = (range(start, min(start + self.size, self.samples)) for start in starts)
        return (one for one in self.batches(groups) if not isinstance(one, EmptyBatch))


def _loading(rule: Training, device: torch.device) -> dict[str, Any]:
    """How batches are loaded."""
    return {"workers": workers_of(rule, device, _ranks()), "pinned": device.type == "cuda"}


def _ranks() -> int:
    """Processes of the training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _fingerprint(prepared: Prepared, parts: tuple[Samples, ...], recipe: Recipe) -> Fingerprint:
    """Without the teacher's, which is told when it is there."""
    model, processor = prepared.model, prepared.source.processor
    return Fingerprint(
        model=fingerprint_of_tensors(dict(model.named_parameters())),
        calibration=_calibration(prepared),
        teacher="",
        data=fingerprint_of_json([part.data.fingerprint for part in parts]),
        processor=fingerprint_of_json(json.loads(processor.to_json_string())),
        recipe=fingerprint_of_json(_deciding(recipe)),
        device=describe_device(next(model.parameters()).device),
    )


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what changes nothing but, in the case of a strategy, the order of sums."""
    fields = recipe.deciding()
    for name in ("workers", "strategy"):
        fields["training"].pop(name)
    cached = bool(fields["training"].pop("teacher_cache"))
    return {**fields, "teacher_cache": True} if cached else fields


def _calibration(prepared: Prepared) -> str:
    """Of the codes that a training is compared with, or whose scales learn; "" without any."""
    codes = dict(prepared.candidate or {})
    if any(prepared.program.nodes(SCALE_CODES)):
        codes |= frozen_weights(run_passes(prepared.program, [Freeze()]).program)
    found = {fqn: code_hash(weight) for fqn, weight in codes.items()}
    return fingerprint_of_json(found) if found else ""
