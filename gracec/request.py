"""What a user asks of `compile`, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from gracec.backends.base import MERGE_INSTEAD, NO_ADAPTERS, UNSIGNED, Format, parse_formats
from gracec.callbacks import check_callbacks
from gracec.data.questions import SAMPLES_FILE, VqaSample, load_samples
from gracec.data.sources import check_is_there
from gracec.errors import GracecError
from gracec.journal import Note
from gracec.models.devices import device_named, dtype_named
from gracec.models.hub import is_hub_name
from gracec.models.lora import has_adapters
from gracec.passes.pipeline import Placed, parse_placed
from gracec.recipe import Recipe, Training
from gracec.registry import nearest
from gracec.store import check_target
from gracec.targets.base import Target, target_named
from gracec.training.trackers import TrackerCallback, check_trackers


@dataclass(frozen=True)
class Request:
    """Everything but the model; for the attributes see `gracec.compile`.

    Attributes:
        recipe: resolved, with all further passes.
        questions, data_name: those of `eval_data` that are asked before and after, and its name.
        notes: what a user should know of what was asked.
    """

    recipe: Recipe
    target: Target
    formats: tuple[Format, ...]
    teacher: Any = None
    train_data: Any = None
    eval_data: Any = None
    processor: Any = None
    output_dir: Path | None = None
    resume: bool = False
    overwrite: bool = False
    strict: bool = False
    inplace: bool = False
    adapters: Literal["merge", "float"] = "merge"
    progress: bool = True
    revision: str | None = None
    teacher_revision: str | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callbacks: tuple[Any, ...] = ()
    report_to: tuple[Any, ...] = ()
    questions: tuple[VqaSample, ...] = ()
    data_name: str = ""
    notes: tuple[Note, ...] = ()

    @classmethod
    def checked(
        cls,
        model: Any,
        recipe: str | Path | Recipe,
        *,
        target: str | Target | None = None,
        formats: str | Sequence[str] = (),
        passes: Sequence[str | Placed] = (),
        output_dir: str | Path | None = None,
        eval_data: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        callbacks: Sequence[Any] = (),
        report_to: Any = (),
        **options: Any,
    ) -> Request:
        """A request that can be kept.

        Raises:
            GracecError: if something does not fit, or would be ignored.
        """
        resolved = with_passes(Recipe.load(recipe), passes)
        questions, data_name = _questions(eval_data)
        request = cls(
            recipe=resolved,
            target=target_named(target),
            formats=tuple(parse_formats(formats)),
            output_dir=None if output_dir is None else Path(output_dir),
            eval_data=eval_data,
            questions=tuple(questions),
            data_name=data_name,
            device=device_named(device),
            dtype=dtype_named(dtype),
            callbacks=check_callbacks(callbacks),
            report_to=check_trackers(report_to),
            **options,
        )
        check_is_there(request.train_data)
        check_is_there(eval_data, "give questions, or a part of the data that is held out")
        request, signs = request._with_scales_that_are_taken()
        request._check_output()
        request._check_revisions(model)
        request._check_adapters(not isinstance(model, (str, Path)) and has_adapters(model))
        notes = request._check_training()
        request._check_questions(model)
        return replace(request, notes=(*signs, *notes))

    @property
    def training(self) -> Training | None:
        """The training that will be done: that of the recipe, if there is something to train on."""
        return self.recipe.training if self.train_data is not None else None

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher answers the questions of `train_data` before they are learned."""
        return self.training is not None and self.training.answers == "teacher"

    @property
    def calibrates_weights(self) -> bool:
        """Whether scales and codes of weights are calibrated on `train_data`."""
        return self.train_data is not None and self.recipe.calibrates_weights

    @property
    def corrects_codes(self) -> bool:
        """Whether codes of weights are corrected on `train_data`, one fused set after the other."""
        return self.calibrates_weights and self.recipe.calibration.method != "moments"

    @property
    def keeps_run(self) -> bool:
        """Whether it takes so long that what is done is kept, to go on from."""
        return self.training is not None or self.corrects_codes

    @cached_property
    def held_out(self) -> Any:
        """What chooses the best state of a training, and is not calibrated on; questions as
        conversations."""
        if isinstance(self.eval_data, (str, Path)) or not self.eval_data:
            return self.eval_data
        return [_as_record(one) if isinstance(one, VqaSample) else one for one in self.eval_data]

    @property
    def training_dir(self) -> Path | None:
        """Where a run keeps what it needs to go on, until the result is published."""
        return None if self.output_dir is None else Path(f"{self.output_dir}.training")

    @property
    def told(self) -> tuple[Any, ...]:
        """What is told of a training: callbacks, and trackers, whose files are beside the
        output."""
        if not self.report_to:
            return self.callbacks
        place = Path("runs") if self.output_dir is None else Path(f"{self.output_dir}.runs")
        return (*self.callbacks, TrackerCallback(self.report_to, place))

    @property
    def further(self) -> tuple[Placed, ...]:
        """The passes that the recipe adds, with their places."""
        return tuple(parse_placed(text) for text in self.recipe.passes)

    def _with_scales_that_are_taken(self) -> tuple[Request, list[Note]]:
        """Without signed scales where the target, or a format, takes no negative ones."""
        saved = self.formats if self.output_dir is not None else ()
        without = [f"format {form.name}" for form in saved if not form.holds_signed]
        without += [] if self.target.holds_signed else [f"target {self.target.name}"]
        if not without or not any(rule.signed for rule in self.recipe.rules()):
            return self, []
        reason = f"{without[0]} takes no negative scales"
        if self.strict:
            raise GracecError(reason, where=f"recipe {self.recipe.name}", fix=UNSIGNED)
        return replace(self, recipe=self.recipe.with_rules(signed=False)), [
            Note("", f"{reason}: unsigned")
        ]

    def _check_output(self) -> None:
        if self.output_dir is None:
            return
        check_target(self.output_dir, self.overwrite)
        plain = [form.name for form in self.formats if not form.holds_activations]
        if self.recipe.quantizes_activations and plain:
            raise GracecError(
                "the recipe quantizes activations, which the format cannot say",
                where=f"format {plain[0]}",
                fix="use --format onnx, or none (formats=()) for the gracec artifact alone",
            )

    def _check_revisions(self, model: Any) -> None:
        """Refuse a revision of what is no repository, which would be ignored."""
        for name, revision, of in (
            ("revision", self.revision, model),
            ("teacher_revision", self.teacher_revision, self.teacher),
        ):
            if revision is not None and not is_hub_name(of):
                raise GracecError(
                    "only a repository of the Hugging Face Hub has revisions",
                    where=name,
                    fix='leave it out, or give "org/name" of one, which no directory is called',
                )

    def _check_adapters(self, given: bool) -> None:
        if self.adapters not in ("merge", "float"):
            raise GracecError(f"unknown adapters {self.adapters!r}", fix="use merge or float")
        if self.adapters == "merge":
            return
        saved = self.formats if self.output_dir is not None else ()
        where, plain = 'adapters="float"', [f.name for f in saved if not f.holds_adapters]
        if not given:
            raise GracecError(
                "the model has no LoRA adapters, so it would be ignored",
                where=where,
                fix="give a PeftModel, or leave it out",
            )
        if self.recipe.quantizes_activations:
            raise GracecError(
                "the recipe quantizes activations, and an adapter takes them in float",
                where=where,
                fix=MERGE_INSTEAD,
            )
        if not self.recipe.rules():
            raise GracecError(
                "the recipe quantizes no weight that an adapter could be beside",
                where=where,
                fix=MERGE_INSTEAD,
            )
        if plain:
            raise GracecError(NO_ADAPTERS, where=f"format {plain[0]}", fix=MERGE_INSTEAD)

    def _check_training(self) -> list[Note]:
        """What the recipe cannot do with what is given, and what is done instead."""
        recipe, where = self.recipe, f"recipe {self.recipe.name}"
        if recipe.quantizes_activations and self.train_data is None:
            raise GracecError(
                "activations need samples to calibrate on, and there is no train_data",
                where=where,
                fix="give train_data (--data): questions or conversations as the model will see",
            )
        if recipe.needs_data and self.train_data is None:
            raise GracecError(
                "calibration.method gptq needs data, and there is no train_data",
                where=where,
                fix="give train_data (--data), or use method: moments, which needs none",
            )
        if recipe.training is None:
            self._check_untrained(where)
        if self.resume and self.output_dir is None:
            raise GracecError("there is nothing to resume without output_dir")
        if recipe.training is None:
            return []
        distils = recipe.training.distillation.needs_teacher
        if self.train_data is not None:
            if self.teacher is None and recipe.training.answers == "teacher":
                return [Note("", "no teacher was given: the original answers and teaches")]
            if self.teacher is None and distils:
                return [Note("", "no teacher was given: a frozen copy of the original teaches")]
            return []
        return self._untrained(where)

    def _check_untrained(self, where: str) -> None:
        """Refuse what a recipe that does not train would ignore."""
        recipe = self.recipe
        weighs = recipe.calibrates_weights or recipe.quantizes_activations
        if self.train_data is not None and not weighs and recipe.rules():
            raise GracecError(
                "the recipe looks at the weights alone, so train_data would be ignored",
                where=where,
                fix="leave it out, or set calibration.method: auto",
            )
        given = {"train_data": self.train_data is not None and not weighs}
        given |= {"teacher": self.teacher is not None, "report_to": bool(self.report_to)}
        given |= {"resume": self.resume and not self.calibrates_weights}
        for name in (name for name, value in given.items() if value):
            raise GracecError(
                f"the recipe does not train, so {name} would be ignored",
                where=where,
                fix="use a training recipe: w4a16",
            )

    def _untrained(self, where: str) -> list[Note]:
        """Without data a training recipe quantizes after training, which strict mode refuses."""
        if not self.recipe.rules():
            raise GracecError(
                "the recipe only trains, and there is no train_data", where=self.recipe.name
            )
        note = "no training data: post-training quantization instead"
        if self.strict or self.teacher is not None or self.resume or self.report_to:
            raise GracecError(note, where=where, fix="give train_data, or w4a16-ptq")
        return [Note("", note)]

    def _check_questions(self, model: Any) -> None:
        """Refuse questions that would be ignored, and an accuracy gate without any."""
        recipe, where = self.recipe, f"recipe {self.recipe.name}"
        if self.eval_data is not None and self.training is None and not self.questions:
            named = isinstance(self.eval_data, (str, Path))
            raise GracecError(
                "eval_data holds no questions, and nothing is trained, so it would be ignored",
                where=str(self.eval_data) if named else "eval_data",
                fix=f"give a folder with {SAMPLES_FILE}",
            )
        if recipe.expect is not None and not self.questions:
            raise GracecError(
                "expect: there are no questions to measure an accuracy on",
                where=where,
                fix=f"give eval_data (--eval-data), a folder with {SAMPLES_FILE}",
            )
        types = list(dict.fromkeys(sample.type for sample in self.questions))
        if recipe.expect is not None and recipe.expect.type not in (None, *types):
            raise GracecError(
                f"expect.type: no question is of type {recipe.expect.type!r}",
                where=where,
                fix=nearest(str(recipe.expect.type), types),
            )
        if self.questions and self.processor is None and not isinstance(model, (str, Path)):
            raise GracecError("questions need the model's processor", fix="pass processor=")


def with_passes(recipe: Recipe, passes: Sequence[str | Placed]) -> Recipe:
    """The recipe with further passes, as text: an artifact lowers with them again when it is read.

    Raises:
        GracecError: if one cannot be written as text.
    """
    texts = [str(one) if isinstance(one, Placed) else one for one in passes]
    return recipe.model_copy(update={"passes": (*recipe.passes, *texts)}) if texts else recipe


def _as_record(question: VqaSample) -> dict[str, Any]:
    picture = question.picture()
    record = {} if picture is None else {"image": picture}
    return {**record, "question": question.question, "answer": question.answer}


def _questions(eval_data: Any) -> tuple[list[VqaSample], str]:
    """Questions that can be answered before and after, and the name of the data."""
    if isinstance(eval_data, (str, Path)) and (Path(eval_data) / SAMPLES_FILE).is_file():
        return load_samples(Path(eval_data)), Path(eval_data).name
    if isinstance(eval_data, Sequence) and not isinstance(eval_data, str):
        return [s for s in eval_data if isinstance(s, VqaSample)], "the given questions"
    return [], ""
