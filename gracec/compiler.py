"""compile(): the whole pipeline on one page. Each stage takes a value and returns a new one.

source -> [answer] -> prepare -> [train] -> freeze -> lower -> publish
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.tracking import GeneralTracker
from transformers import PreTrainedModel

from gracec import reload
from gracec.backends.base import Format
from gracec.callbacks import Callback, stage
from gracec.compiled import CompiledModel, load
from gracec.directories import check_target, clear_leftovers, unused
from gracec.errors import GateError
from gracec.frozen import Frozen
from gracec.journal import Journal
from gracec.passes.pipeline import Placed
from gracec.recipe import Recipe
from gracec.report import Report
from gracec.request import Request
from gracec.stages.answer import answer
from gracec.stages.examine import (
    Exam,
    cost_of_rounding,
    examine_compiled,
    examine_original,
    rounding_cost,
)
from gracec.stages.freeze import freeze, release
from gracec.stages.lower import lower
from gracec.stages.pipelines import lowering_passes
from gracec.stages.prepare import accept, prepare
from gracec.stages.publish import write_artifact
from gracec.stages.source import load_source
from gracec.stages.train import find_teacher, train
from gracec.targets.base import Runtime, Target
from gracec.training.ranks import rank
from gracec.training.run_directory import FROZEN, alone_in, kept_of_user, open_run, remove_run

__all__ = ["CompiledModel", "compile", "load"]


def compile(
    model: PreTrainedModel | str | Path,
    recipe: str | Path | Recipe = "w4a16",
    *,
    teacher: PreTrainedModel | str | Path | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    processor: Any = None,
    output_dir: str | Path | None = None,
    formats: str | Sequence[str] = ("hf",),
    target: str | Target | None = None,
    passes: Sequence[str | Placed] = (),
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    inplace: bool = False,
    adapters: Literal["merge", "float"] = "merge",
    check_reload: bool | None = None,
    progress: bool = True,
    revision: str | None = None,
    teacher_revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    report_to: str | GeneralTracker | Sequence[str | GeneralTracker] | None = None,
    callbacks: Sequence[Callback | Any] = (),
) -> CompiledModel:
    """Compile a vision-language model to INT4 weights.

    Args:
        model: a Hugging Face model, the directory of one, or "org/name" of a repository of the
            Hugging Face Hub; or a `PeftModel`, with LoRA adapters. A directory that exists is
            meant before a repository of its name.
        recipe: a built-in name, the path of a YAML file, or a `Recipe`.
        teacher: what a training recipe distils from: a model of the same family and tokenizer, of
            any width, named as `model` is. Without one, a frozen copy of the original teaches.
        train_data: LLaVA conversations, a `datasets` folder, a folder of questions, or "org/name"
            or "org/name:split" of a dataset of the Hub; see `gracec.data.conversations`. Without
            it a training recipe falls back to post-training quantization and says so; in strict
            mode that is an error. Codes and scales are calibrated on it, whether the recipe trains
            or not, unless `calibration.method` says otherwise; without training it may be plain
            text, or questions without answers. A recipe that quantizes activations needs it.
        eval_data: chooses the best state of a training, instead of a part of `train_data`, and is
            not calibrated on. A folder of questions is also answered before and after, and the
            accuracies go into the report.
        processor: saved with the result; loaded from the directory when `model` is one.
        output_dir: where to save the result. A training keeps its checkpoints beside it, in
            `<output_dir>.training`, and the frozen model in `<output_dir>.training/frozen`, until
            the result is there.
        formats: what to save for other libraries, beside the canonical codes; () for none.
        target: what runs the result: "torchao" (the default), "onnxruntime", or one of another
            package.
        passes: further passes, each with its place: "my-pass{depth=2} after plan-quantization".
        resume: go on with a training, or a calibration on data, that was interrupted.
        overwrite: let `output_dir` be an artifact already, which is replaced when all is done.
        strict: refuse what would otherwise be reported and left in the original precision.
        inplace: take the caller's model apart, so that its float weights give their memory back.
        adapters: of a `PeftModel`: "merge" makes them part of the weights before anything else;
            "float" quantizes the weights without them and keeps them beside, in the dtype of the
            recipe. They train with the part that they are in.
        check_reload: load what was saved in a process of its own and hold its logits to those in
            memory; by default yes, unless the environment says GRACEC_CHECK_RELOAD=0.
        progress: show a training on standard error.
        revision, teacher_revision: branch, tag or commit of the repository that `model`, or
            `teacher`, is; by default the main branch. The commit is in the report.
        device: where everything is computed, "cpu" or "cuda:1": a model and a teacher that are
            named are put there. A model in memory stays where it is, and so does the result.
        dtype: what a model that is named is read in, "float32", "bfloat16" or "float16", and so
            what is calibrated and compared with; by default as it is stored. What the result runs
            in is `deploy.dtype` of the recipe.
        report_to: trackers of a training: names that accelerate knows ("tensorboard", "wandb",
            "mlflow", ...), or its `GeneralTracker` objects. Those that write files have them in
            `<output_dir>.runs`, or `runs` without one.
        callbacks: objects that are told of stages, steps and evaluations, and may end a training;
            see `gracec.callbacks.Callback`.

    Raises:
        GracecError: if the model, the recipe, the data or the output directory does not fit.
        GateError: if the result is not numerically what it should be, or not as accurate as the
            recipe expects; then it is kept as `<output_dir>.failed`, or `.failed-2` and so on.
    """
    request = Request.checked(
        model,
        recipe,
        teacher=teacher,
        train_data=train_data,
        eval_data=eval_data,
        processor=processor,
        output_dir=output_dir,
        formats=formats,
        target=target,
        passes=passes,
        resume=resume,
        overwrite=overwrite,
        strict=strict,
        inplace=inplace,
        adapters=adapters,
        progress=progress,
        revision=revision,
        teacher_revision=teacher_revision,
        device=device,
        dtype=dtype,
        report_to=report_to,
        callbacks=callbacks,
    )
    lowering_passes(request)  # one that has no place is refused before a weight is read
    journal = Journal(list(request.notes))
    with alone_in(request.training_dir if request.keeps_run else None):
        clear_place(request, journal)
        frozen, exam = quantize(model, request, journal)
        told = listeners(request)
        runtime = stage(
            told, "lower", lower, frozen, request.target, journal, strict=request.strict
        )
        exam = stage(told, "evaluate", examine_compiled, exam, runtime, frozen.processor, request)
        exact = request.target.exact(runtime, frozen) if exam.lost else None
        if exact is not None:
            found = compare(exact, exam, request, journal)
            if found is not None:
                frozen, (runtime, exam) = exact, found
                request = replace(request, recipe=request.recipe.with_onnx(**dict(exact.onnx)))
        journal.accuracy = exam.accuracy
        check = reload.wanted(check_reload)
        return stage(told, "publish", publish, frozen, runtime, exam, request, journal, check)


def listeners(request: Request) -> tuple[Any, ...]:
    """The callbacks, in the first process of a run."""
    return request.callbacks if rank() == 0 else ()


def clear_place(request: Request, journal: Journal) -> None:
    """Look at the place of the output once more, now that nobody else runs for it."""
    if request.output_dir is not None and rank() == 0:
        check_target(request.output_dir, request.overwrite)
        journal.note("", *clear_leftovers(request.output_dir))
    if request.training_dir is not None and request.keeps_run and rank() == 0:
        journal.note("", *open_run(request.training_dir, resume=request.resume))


def quantize(model: Any, request: Request, journal: Journal) -> tuple[Frozen, Exam]:
    """From a model to its codes. No float weight that is the compiler's own outlives it."""
    request = find_teacher(request, journal)
    told = listeners(request)
    source = stage(told, "load", load_source, model, request, journal)
    exam = stage(told, "examine", examine_original, source, request)
    if request.asks_teacher:
        request = stage(told, "answer", answer, source, request, journal)
    prepared = stage(told, "prepare", prepare, source, request, journal)
    accept(prepared, request)
    if request.training is not None:
        # In place: a copy would be as large as the model in float32, all through the training.
        prepared = stage(told, "train", train, prepared, request, journal, inplace=True)
    frozen = stage(told, "freeze", freeze, prepared, request, journal)
    if request.inplace:
        release(source, frozen)
    if request.training is not None:
        keep(frozen, request, journal)
    return frozen, exam


def keep(frozen: Frozen, request: Request, journal: Journal) -> None:
    """Keep what a training came to until it is published: what fails later costs no training."""
    if request.training_dir is not None and rank() == 0:
        kept, report = request.training_dir / FROZEN, Report.of(request.recipe, journal)
        write_artifact(kept, frozen, (), report, overwrite=True)


def compare(
    exact: Frozen, exam: Exam, request: Request, journal: Journal
) -> tuple[Runtime, Exam] | None:
    """Ask a model that does not round, where the answers of one that does are not good enough.

    Returns:
        The model and its answers, if rounding is why; else None.
    """
    own = Journal()
    runtime = lower(exact, request.target, own, strict=request.strict)
    found = examine_compiled(exam, runtime, exact.processor, request)
    cost = cost_of_rounding(exam, found)
    if not cost:
        return None
    journal.note("evaluate", f"lowered again without rounding, which costs too much: {cost}")
    journal.extend(own.notes)
    journal.figures.update(own.figures)
    return runtime, found


def publish(
    frozen: Frozen,
    runtime: Runtime,
    exam: Exam,
    request: Request,
    journal: Journal,
    check_reload: bool = False,
) -> CompiledModel:
    """The result with its report; what is saved is what is in memory.

    Raises:
        GateError: if the accuracy is below what the recipe expects, or a fresh process computes
            something else from what was saved.
    """
    failed, place, report = exam.failure is not None, request.output_dir, None
    if place is not None and rank() == 0:
        run = request.training_dir if request.keeps_run else None
        if run is not None:
            journal.note("training", *kept_of_user(run))
        place = unused(Path(f"{place}.failed")) if failed else place
        unknown = reload.refusal(frozen, request.target)
        if check_reload and unknown:
            journal.note("", f"not loaded again in a fresh process: {unknown}")
        report, _ = write_artifact(
            place,
            frozen,
            _examined(request, exam, frozen.processor),
            recipe=request.recipe,
            journal=journal,
            overwrite=request.overwrite and not failed,
            check=partial(
                reload.reloaded_equals_compiled,
                frozen=frozen,
                runtime=runtime,
                target=request.target,
            )
            if check_reload and not unknown
            else None,
        )
        if run is not None:
            remove_run(run)
    if exam.failure is not None:
        kept = "" if place is None else f"; kept as {place}"
        raise GateError(f"{exam.failure}{kept}") from exam.failure
    report = report or Report.of(request.recipe, journal)
    assert frozen.reference is not None
    return CompiledModel(replace(frozen, reference=frozen.reference.short()), runtime, report)


def _examined(request: Request, exam: Exam, processor: Any) -> tuple[Format, ...]:
    """The formats, which ask a model the same questions before they let it round more than the
    target does; what a target that reads their files did was examined already."""
    if exam.after is None or request.target.reads:
        return request.formats
    accept = partial(rounding_cost, exam, request, processor)
    return tuple(form.examined(accept) for form in request.formats)
