"""Plan a training: memory of every kind, seconds of a step, settings that fit. No weight is read.

    student, teacher    as stand-ins, captured, with the passes of training
    samples             through the processor
    rehearsal           a micro-batch on fake tensors: activations, temporaries, operations

What is sharded is counted as `fully_shard` has it: every device holds its rows of weights, moments
and gradients, and in full one block that is computed and the next one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from gracec.capture import capture
from gracec.data.collate import Collator
from gracec.errors import GracecError
from gracec.models.devices import dtype_named
from gracec.models.hub import Named, Place, find_description
from gracec.models.loading import configured_dtype, load_config, load_processor
from gracec.objective import LazyLogits
from gracec.passes.base import run_passes
from gracec.passes.plan_quantization import Plan, plan_of
from gracec.recipe import Recipe, Training
from gracec.report.training_plan import Planned, PlannedCache, Setting, TrainingPlan
from gracec.stages.pipelines import ANALYSIS, learning
from gracec.stages.prepare import plan as plan_quantization
from gracec.stages.source import stand_in_source
from gracec.training.footprint import MASTER, Count, Footprint
from gracec.training.learner import Learner
from gracec.training.micro_batch import Batch, MicroBatch
from gracec.training.planned_samples import (
    PlannedSamples,
    Stated,
    samples_of_data,
    sizes,
    stated_samples,
)
from gracec.training.rehearsal import Rehearsal, Taught, rehearse, rehearse_teacher
from gracec.training.samples import open_samples
from gracec.training.setup import allow_mixed_precision, objective_of, steps_of, trainable
from gracec.training.sharding import bytes_of_a_rank, room_of
from gracec.training.teacher import check_teacher, check_tokenizers, taught_ids
from gracec.training.teacher_cache import bytes_on_disk, head_of

TFLOPS = {"cuda": {"bfloat16": 350.0, "float32": 45.0}, "cpu": {"bfloat16": 0.1, "float32": 0.1}}
"""What matmuls reach, in 10^12 operations a second, where nobody says: a third of the peak of an
H100 in bfloat16, and most of its peak in float32, which torch computes without TF32; a core or two
of a processor."""
BANDWIDTH = {"cuda": 2000.0, "cpu": 20.0}
"""Memory that is read and written, in 10^9 bytes a second, where nobody says."""
NEW_MEMORY = {"cuda": math.inf, "cpu": 2.0}
"""Likewise, what is had from the system for a large tensor and given back with it: on a GPU it is
kept for the next one."""
ADAMW = 40
"""Bytes that clipping and AdamW read and write for each number that learns."""
QUANTIZING = 120
"""Bytes that are read and written for each quantized weight once a step: it is quantized, and its
gradient becomes those of weight and scale."""
UNTOUCHED = Recipe(name="untouched", weights={})
Strategy = Literal["ddp", "sharded"] | None
MOST_SETTINGS = 16
MOST_AT_ONCE = 64
"""Samples of a micro-batch that is planned."""


def plan(
    model: Named,
    recipe: str | Path | Recipe = "w4a16",
    *,
    teacher: Named | None = None,
    data: Any = None,
    devices: int = 1,
    memory_per_device: str | int = "80GB",
    device_tflops: float | None = None,
    device_bandwidth: float | None = None,
    device_new_memory: float | None = None,
    device: str = "cuda",
    dtype: str | torch.dtype | None = None,
    stated: Stated | None = None,
    revision: str | None = None,
    teacher_revision: str | None = None,
) -> TrainingPlan:
    """Plan the training of a recipe, from configurations alone.

    Args:
        model: a directory, of which `config.json` is enough, or "org/name" of the Hugging Face Hub.
        recipe: with a `training` section.
        teacher: named likewise; by default the original itself teaches.
        data: as for `gracec.compile`; some of its samples go through the processor. Without it
            samples are as `stated`.
        devices: processes of the training, one a device.
        memory_per_device: "80GB", "24GiB", or bytes.
        device_tflops: what a device reaches in matmuls of the recipe's precision, in 10^12
            operations a second; by default 350 in bfloat16 and 45 in float32.
        device_bandwidth: what a device reads and writes of its memory, in 10^9 bytes a second; by
            default 2000. Operators that are no matmul take the time of their operands.
        device_new_memory: what the system gives of memory for tensors of 32 MiB and more, in 10^9
            bytes a second; by default 2 on the CPU. On a GPU it takes no time.
        device: "cuda", or "cpu", where the best state is in the same memory.
        dtype: what the models are read in; by default as stored.
        stated: a sample, where there is no data.
        revision, teacher_revision: of a repository.

    Raises:
        GracecError: if the recipe does not train, or models, data or numbers do not fit.
    """
    recipe = Recipe.load(recipe)
    rule = recipe.training
    if rule is None:
        raise GracecError("it does not train", where=f"recipe {recipe.name}", fix="try w4a16")
    if device not in TFLOPS:
        raise GracecError(
            f"no plan for {device!r}", where="device", fix=f"use {' or '.join(TFLOPS)}"
        )
    if not 1 <= devices <= rule.batch_size:
        raise GracecError(
            f"{devices} devices share {rule.batch_size} samples of a step",
            where="devices",
            fix="give 1 or more, and a batch_size that leaves each a sample",
        )
    memory = _bytes_of(memory_per_device)
    rule = rule.model_copy(update={"precision": _precision(rule, device)})
    rates = Rates.of(device, rule.precision, device_tflops, device_bandwidth, device_new_memory)
    place = find_description(model, revision)
    own = find_description(teacher, teacher_revision) if teacher is not None else None
    pair = Pair.read(place, own, recipe, rule, device, dtype_named(dtype))
    samples = pair.samples(data, stated or Stated())
    return Planner(pair, samples, devices, memory, rates, Rehearsals(pair, samples)).plan()


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        tflops: in matmuls, by dtype, in 10^12 operations.
        bandwidth: memory that it reads and writes, in 10^9 bytes.
        new_memory: memory that the system gives it for large tensors, in 10^9 bytes.
    """

    tflops: Mapping[str, float]
    bandwidth: float
    new_memory: float

    @classmethod
    def of(
        cls,
        device: str,
        precision: str = "float32",
        tflops: float | None = None,
        bandwidth: float | None = None,
        new_memory: float | None = None,
    ) -> Rates:
        """Those of a kind of device, where nothing else is given.

        Args:
            precision: that `tflops` is of; the others are in proportion.

        Raises:
            GracecError: if what is given is no rate.
        """
        given = {"tflops": tflops, "bandwidth": bandwidth, "new_memory": new_memory}
        for name, rate in given.items():
            if rate is not None and not (rate > 0 and math.isfinite(rate)):
                raise GracecError(
                    f"{rate} is no rate", where=f"device_{name}", fix="give a positive number"
                )
        usual = TFLOPS[device]
        factor = 1.0 if tflops is None else tflops / usual[precision]
        return cls(
            {name: rate * factor for name, rate in usual.items()},
            bandwidth or BANDWIDTH[device],
            new_memory or NEW_MEMORY[device],
        )

    def seconds(self, precision: str, operations: float, moved: float, new_pages: float) -> float:
        """Of operations in matmuls and bytes of memory."""
        in_matmuls = operations / (self.tflops[precision] * 1e12)
        return in_matmuls + (moved / self.bandwidth + new_pages / self.new_memory) / 1e9


@dataclass(frozen=True)
class Pair:
    """Student and teacher as they are trained, of stand-ins.

    Attributes:
        original: bytes of the model as it is given.
        teaching: bytes of a teacher of its own, 0 where the original teaches.
    """

    place: Place
    own_teacher: Place | None
    recipe: Recipe
    rule: Training
    device: str
    student: Learner
    teacher: Learner | None
    footprint: Footprint
    teacher_footprint: Footprint | None
    original: int
    teaching: int
    notes: tuple[str, ...]
    mode: FakeTensorMode

    @classmethod
    def read(
        cls,
        place: Place,
        own: Place | None,
        recipe: Recipe,
        rule: Training,
        device: str,
        dtype: torch.dtype | None,
    ) -> Pair:
        stored = _in_memory(place, device, dtype)
        student = stand_in_source(place.path, recipe, torch.float32).model
        original = stand_in_source(place.path, UNTOUCHED, stored).model
        captured = capture(student)
        planned = plan_quantization(captured, recipe)
        trained = run_passes(planned.program, learning(rule)).program
        footprint = Footprint.of(student, trained, plan_of(planned.program), rule)
        if not footprint.learned:
            raise GracecError(
                "nothing learns: every part with something to learn is frozen",
                where="training.frozen",
                fix="leave a part out of it, or quantize one that is not in it",
            )
        teacher, teaching, notes = None, 0, [str(note) for note in planned.notes]
        of_teacher: Footprint | None = None
        if rule.distillation.needs_teacher:
            found, ids = original, None
            if own is not None:
                found = stand_in_source(own.path, UNTOUCHED, _in_memory(own, device, dtype)).model
                ids = _taught_ids(student, found, place, own, notes)
                teaching = _parameter_bytes(found)
            alike = own is None and stored == torch.float32
            program = run_passes(captured if alike else capture(found), ANALYSIS).program
            teacher = Learner(run_passes(program, learning(rule)).program, found, ids)
            of_teacher = Footprint.of(found, teacher.program, Plan(), rule)
        return cls(
            place,
            own,
            recipe,
            rule,
            device,
            Learner(trained, student),
            teacher,
            footprint,
            of_teacher,
            _parameter_bytes(original),
            teaching,
            tuple(notes),
            FakeTensorMode(allow_non_fake_inputs=True),
        )

    def samples(self, data: Any, stated: Stated) -> PlannedSamples:
        """Those that the plan is made for."""
        model = self.student.model
        if data is None:
            return stated_samples(model, self.place.path, stated)
        collate = Collator(load_processor(self.place.path), model, self.rule.max_length)
        samples, held_out = open_samples(data, None, self.rule, collate)
        return samples_of_data(samples, len(held_out))

    def micro(self, batch: Batch) -> MicroBatch:
        """A batch as it is trained on."""
        rule = self.rule
        images, everywhere = bool(rule.distillation.omega), rule.labels == "all"
        return MicroBatch.read(self.student.model, batch, images=images, everywhere=everywhere)

    @cached_property
    def head(self) -> LazyLogits | None:
        """What is left of a teacher in files; None where it cannot be in files.

        Raises:
            GracecError: if the recipe wants it there all the same.
        """
        if self.teacher is None:
            return None
        return head_of(self.teacher) if self.rule.teacher_cache else self.teacher.head()

    @property
    def kept_head(self) -> int:
        """Bytes of it, which are those of the original where that teaches."""
        return sum(one.nbytes for one in self.taught_by(cached=True)) if self.teaching else 0

    def taught_by(self, *, cached: bool) -> Iterable[Tensor]:
        """What a training holds of its teacher."""
        if not cached:
            return () if self.teacher is None else self.teacher.tensors()
        held = () if self.head is None else (self.head.weight, self.head.bias)
        return (one for one in held if one is not None)

    def bytes_of_a_rank(self, *, cached: bool) -> int:
        """As the training counts them, before it is sharded or not."""
        program, foot = self.student.program, self.footprint
        learn: dict[str, nn.Parameter] = {}
        for name, tensor in trainable(program, self.rule.frozen).items() if foot.masters else ():
            # What the graph reads quantized is in the place of its master, which is beside it.
            beside = nn.Parameter(tensor.detach().to("meta"))
            learn[name] = beside if name in foot.quantized else tensor
        learn["scales"] = nn.Parameter(torch.empty(foot.scales, device="meta"))
        held = SimpleNamespace(tensors=partial(self.taught_by, cached=cached))
        return bytes_of_a_rank(program, learn, held)

    def rehearsed(self, micro: MicroBatch, taught: Taught | None, precision: str) -> Rehearsal:
        """A micro-batch of the student."""
        student, narrow = self.student, precision == "bfloat16"
        if narrow:
            student = replace(student, program=allow_mixed_precision(student.program))
        vocabulary = None if self.teacher is None else self.teacher.vocabulary
        return rehearse(
            student,
            taught,
            micro,
            objective_of(self.rule, 2, vocabulary),
            self.footprint.learning,
            self.mode,
            narrow=narrow,
        )


@dataclass(frozen=True)
class Planner:
    """Puts settings to what was rehearsed."""

    pair: Pair
    given: PlannedSamples
    devices: int
    memory: int
    rates: Rates
    rehearsals: Rehearsals

    def plan(self) -> TrainingPlan:
        pair, rule, model = self.pair, self.pair.rule, self.pair.student.model
        wanted = self.planned(self.given_setting())
        fitting, refused = self.settings()
        longest = self.given.longest(1)
        visual, supervised = sizes(model, longest, everywhere=rule.labels == "all")
        taught, typical = self.rehearsals.of(0, rule.precision)
        return TrainingPlan(
            model=str(pair.place),
            teacher="" if pair.own_teacher is None else str(pair.own_teacher),
            recipe=pair.recipe.name,
            device=pair.device,
            devices=self.devices,
            memory=self.memory,
            tflops=self.rates.tflops,
            bandwidth=self.rates.bandwidth,
            new_memory=None if math.isinf(self.rates.new_memory) else self.rates.new_memory,
            samples=self.given.source,
            tokens=longest["input_ids"].shape[1],
            mean_tokens=self.given.mean,
            visual=visual,
            supervised=supervised,
            batch_size=rule.batch_size,
            steps=None if self.given.count is None else steps_of(rule, self.given.count),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            quantized=pair.footprint.held,
            learning=pair.footprint.masters,
            operations={
                "teacher": 0 if taught is None else taught.operations,
                "forward": typical.forward,
                "backward": typical.backward,
                "again": typical.again,
            },
            wanted=wanted,
            otherwise=None if self.cache is None else self.planned(self.given_setting(other=True)),
            cache=self.cache,
            settings=tuple(fitting[:MOST_SETTINGS]),
            refused=refused,
            notes=pair.notes,
        )

    def given_setting(self, *, other: bool = False) -> Setting:
        """The recipe as it is; what it leaves open is what the training takes.

        Args:
            other: with a teacher's cache where the recipe has none, and without where it has one.
        """
        rule = self.pair.rule
        cached = (not rule.teacher_cache) if other else rule.teacher_cache
        strategy: Strategy = None
        if self.devices > 1:
            sharded = rule.strategy == "sharded"
            if rule.strategy == "auto" and not rule.compile:
                sharded = self.pair.bytes_of_a_rank(cached=bool(cached)) > room_of(self.memory)
            strategy = "sharded" if sharded else "ddp"
        return Setting(
            min(rule.micro_batch_size, self.share),
            str(rule.precision),
            rule.activation_checkpointing == "blocks",
            strategy,
            cached,
        )

    @cached_property
    def cache(self) -> PlannedCache | None:
        """Files of what the teacher says; None without a teacher whose head can be taken out."""
        teacher, rule = self.pair.teacher, self.pair.rule
        taught = self.rehearsals.of(0, rule.precision)[0]
        if self.pair.head is None or teacher is None or taught is None:
            return None
        looked_at = self.given.looked_at
        each = sum(bytes_on_disk(teacher, self.pair.micro(one)) for one in looked_at)
        samples = self.given.count
        if samples is not None and rule.chooses_by_teacher:
            samples += self.given.held_out or 0
        return PlannedCache(
            round(each / len(looked_at)), samples, self.teacher_seconds(taught, 1) / self.devices
        )

    @cached_property
    def filling(self) -> float:
        """Seconds of the teacher for its cache, shared out among all steps."""
        if self.cache is None:
            return 0.0
        rule, count = self.pair.rule, self.given.count
        if count is None or self.cache.samples is None:
            # Without data every sample is seen once in an epoch.
            passes = 1.0 if rule.steps else rule.epochs
            return self.cache.sample_seconds * rule.batch_size / passes
        return self.cache.sample_seconds * self.cache.samples / steps_of(rule, count)

    @property
    def share(self) -> int:
        """Samples of an optimizer step on one device, at most."""
        return math.ceil(self.pair.rule.batch_size / self.devices)

    def settings(self) -> tuple[list[Planned], Planned | None]:
        """Those that fit, best first: with each the largest micro-batch; or the least that was
        too much."""
        strategies: tuple[Strategy, ...] = ("ddp", "sharded") if self.devices > 1 else (None,)
        folder = self.pair.rule.teacher_cache or True
        caches = (False,) if self.cache is None else (False, folder)
        kinds = itertools.product(("bfloat16", "float32"), (False, True), strategies, caches)
        most = min(self.share, MOST_AT_ONCE)
        counts = [1 << i for i in range(most.bit_length()) if 1 << i < most]
        found, refused = list[Planned](), list[Planned]()
        for precision, checkpointing, strategy, cached in kinds:
            for count in (most, *reversed(counts)):
                one = self.planned(Setting(count, precision, checkpointing, strategy, cached))
                if one.peak <= self.memory:
                    found.append(one)
                    break
            else:
                refused.append(one)
        found.sort(
            key=lambda one: (
                one.seconds + one.filling_seconds,
                bool(one.setting.teacher_cache),
                one.setting.sharded,
                one.peak,
            )
        )
        least = min(refused, key=lambda one: one.peak, default=None)
        return found, None if found else least

    def planned(self, setting: Setting) -> Planned:
        """What a setting takes."""
        count = setting.micro_batch_size
        batches = math.ceil(self.share / count)
        bytes_at = self.bytes_at(setting, batches)
        at = max(bytes_at, key=lambda name: sum(bytes_at[name].values()))
        student, teacher = self.seconds(setting)
        kinds = {kind: count for kind, count in bytes_at[at].items() if count}
        filling = self.filling if setting.teacher_cache else 0.0
        return Planned(setting, kinds, at, student, teacher, filling)

    def seconds(self, setting: Setting) -> tuple[float, float]:
        """Of an optimizer step: student and teacher."""
        foot, (taught, typical) = self.pair.footprint, self.rehearsals.of(0, setting.precision)
        count, again = setting.micro_batch_size, setting.checkpointing
        samples = self.share * self.given.padded(count)
        # Attention grows with the square of the length: what is computed is that of the typical
        # sample. But logits that are more than a chunk are computed again in the backward pass.
        alone = self.rehearsed(1, setting.precision)[1]
        teaching, longest = self.rehearsed(count, setting.precision)
        in_chunks = longest.computed / (count * alone.computed)
        operations = in_chunks * typical.computed + again * typical.again
        # Gradients of parameters are added up once a micro-batch, however long it is.
        batches = samples / count * self.given.mean / max(self.given.lengths)
        moved = batches * (longest.moved + again * longest.moved_again)
        new_pages = batches * (longest.new_pages + again * longest.new_pages_again)
        ranks = self.devices if setting.sharded else 1
        moved += (ADAMW * foot.learned + QUANTIZING * foot.held) / ranks
        student = self.rates.seconds(setting.precision, samples * operations, moved, new_pages)
        if taught is None or teaching is None or setting.teacher_cache:
            return student, 0.0
        operations = math.ceil(samples * taught.operations / batches)
        return student, self.teacher_seconds(replace(teaching, operations=operations), batches)

    def teacher_seconds(self, taught: Taught, batches: float) -> float:
        """Of so many micro-batches."""
        assert self.pair.teacher is not None
        one = self.rates.seconds(
            _rate_name(self.pair.teacher.program.dtype),
            taught.operations,
            taught.moved,
            taught.new_pages,
        )
        return batches * one

    def bytes_at(self, setting: Setting, batches: int) -> dict[str, dict[str, int]]:
        """Time of a step -> kind -> bytes of one device."""
        said, micro = self.rehearsed(setting.micro_batch_size, setting.precision)
        taught, teaching = (0, 0) if said is None else (said.bytes, said.peak)
        if said is not None and setting.teacher_cache:
            taught = said.cached
        pair, foot = self.pair, self.pair.footprint
        ranks = self.devices if setting.sharded else 1
        learned = MASTER * foot.learned // ranks
        # Where scales alone learn, one device hands each gradient on as soon as it is there.
        at_once = bool(foot.codes) and self.devices == 1
        of_graph = foot.plain + (foot.scales if at_once else foot.with_gradient)
        of_graph = MASTER * of_graph // ranks
        gathered, passing = (0, 0) if not setting.sharded else self.gathered(setting)
        kept = {
            "masters": learned,
            "frozen": (MASTER * foot.others + foot.codes) // ranks,
            "w_hat": MASTER * foot.held // ranks,
            "moments": 2 * learned,
            "best": learned if pair.device == "cpu" else 0,
            "original": pair.original,
            # The head of a teacher in files is in no shards.
            "teacher": pair.kept_head if setting.teacher_cache else pair.teaching // ranks,
        }
        activations, peak, in_graph = micro.saved, micro.peak, of_graph
        if setting.checkpointing:
            activations, peak = micro.kept, micro.computed_again
        elif batches == 1:  # gradients come as activations go
            peak, in_graph = micro.saved, micro.first - micro.saved
        before: dict[str, dict[str, int]] = {}
        if setting.sharded:
            # The student lets go of all but its rows before the teacher is loaded.
            rows = {kind: kept[kind] for kind in ("masters", "frozen", "w_hat", "original")}
            before = {
                "before the student is sharded": {
                    "masters": MASTER * foot.learned,
                    "frozen": MASTER * foot.others + foot.codes,
                    "original": pair.original,
                },
                "before the teacher is sharded": {**rows, "teacher": pair.teaching},
            }
        teacher_runs = {
            **kept,
            "gathered": gathered,
            "taught": batches * taught,
            "batches": batches * micro.inputs,
            "temporary": teaching - taught,
        }
        if setting.teacher_cache:
            # Its teacher runs before the student has moments, on one sample.
            one = self.rehearsed(1, setting.precision)[0]
            teacher_runs = {
                **{kind: kept[kind] for kind in ("masters", "frozen", "w_hat", "original")},
                "teacher": pair.teaching,
                "temporary": 0 if one is None else one.peak,
            }
            before.pop("before the teacher is sharded", None)
        return {
            **before,
            "filling the cache" if setting.teacher_cache else "teacher": teacher_runs,
            "micro-batch": {
                **kept,
                "gradients": in_graph,
                "gathered": gathered + passing,
                "taught": batches * taught,
                "batches": batches * micro.inputs,
                "activations": activations,
                "temporary": peak - activations,
            },
            "optimizer": {
                **kept,
                "gradients": learned,
                "batches": batches * micro.inputs,
            },
        }

    def gathered(self, setting: Setting) -> tuple[int, int]:
        """Of what is sharded, bytes that are in full at once: weights, and gradients."""
        foot, teacher = self.pair.footprint, self.pair.teacher_footprint

        def weights(count: Count) -> int:
            return MASTER * (count.quantized + count.plain + count.still)

        def gradients(count: Count) -> int:
            return MASTER * (count.quantized + count.plain)

        full = weights(foot.root) + 2 * weights(foot.block)
        runs = not setting.teacher_cache and self.pair.teaching
        if runs and teacher is not None and self.pair.teacher is not None:
            root, size = teacher.root, self.pair.teacher.program.dtype.itemsize
            full += size * (root.quantized + root.plain + root.still)
        return full, gradients(foot.root) + gradients(foot.block)

    def rehearsed(self, samples: int, precision: str) -> tuple[Taught | None, Rehearsal]:
        """So many times the longest sample, of the teacher and the student.

        Of the recipe's own number, of one and of the most; others lie between the latter.
        """
        most = min(self.share, MOST_AT_ONCE)
        if samples in (1, most, self.pair.rule.micro_batch_size):
            return self.rehearsals.of(samples, precision)
        (less, one), (more, all_) = (self.rehearsed(n, precision) for n in (1, most))
        share = (samples - 1) / (most - 1)
        taught = None if less is None or more is None else less.between(more, share)
        return taught, one.between(all_, share)


class Rehearsals:
    """Rehearsals that were made, by the number of samples, 0 for the typical one, and precision."""

    def __init__(self, pair: Pair, given: PlannedSamples) -> None:
        self.pair, self.given = pair, given
        self.taught: dict[int, Taught | None] = {}
        self.made: dict[tuple[int, str], Rehearsal] = {}

    def of(self, samples: int, precision: str) -> tuple[Taught | None, Rehearsal]:
        """So many times the longest sample, or the typical one."""
        if samples == 0 and self.given.one_length:
            samples = 1
        if (samples, precision) not in self.made:
            batch = self.given.longest(samples) if samples else self.given.typical
            micro, teacher = self.pair.micro(batch), self.pair.teacher
            if samples not in self.taught:
                taught = rehearse_teacher(teacher, micro, self.pair.mode) if teacher else None
                self.taught[samples] = taught
            found = self.pair.rehearsed(micro, self.taught[samples], precision)
            self.made[samples, precision] = found
        return self.taught[samples], self.made[samples, precision]


def _taught_ids(
    student: PreTrainedModel, teacher: PreTrainedModel, place: Place, own: Place, notes: list[str]
) -> int | None:
    """How many ids a teacher of its own teaches, once it fits its student."""
    check_teacher(student, teacher)
    processor, other = _processor(place), _processor(own)
    if processor is None or other is None:
        which = place if processor is None else own
        notes.append(f"tokenizers are not compared: {which} has no processor")
    else:
        check_tokenizers(processor, other)
    return taught_ids(student, teacher, processor)


def _processor(place: Place) -> Any:
    """The processor of a directory, None where it has none."""
    try:
        return load_processor(place.path)
    except GracecError:
        return None


def _in_memory(place: Place, device: str, dtype: torch.dtype | None) -> torch.dtype:
    """What a model is read in."""
    stored = dtype or configured_dtype(load_config(place.path)) or torch.float32
    widened = dtype is None and stored == torch.float16 and device == "cpu"
    return torch.float32 if widened else stored


def _parameter_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _precision(rule: Training, device: str) -> str:
    """What matmuls are in: "auto" is bfloat16, but on the CPU."""
    found = str(rule.precision)
    if found != "auto":
        return found
    return "float32" if device == "cpu" else "bfloat16"


def _rate_name(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "bfloat16"


def _bytes_of(memory: str | int) -> int:
    """ "80GB", "24GiB" or a number of bytes.

    Raises:
        GracecError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT]?)(i?)B)?", str(memory).strip())
    if found is None or not float(found[1]):
        raise GracecError(
            f"{str(memory)!r} is no memory", where="memory_per_device", fix="say 80GB or 24GiB"
        )
    power = " kMGT".index(found[2] or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
