"""What a training takes before it begins: bytes of every kind, seconds, and settings that fit.

A step has three times, at one of which it is highest, unless what is sharded is still whole before,
or the teacher fills its cache.

    teacher        masters + moments + ŵ                   + activations of the teacher
    micro-batch    masters + moments + ŵ + dL/dŵ so far    + activations of one micro-batch
    optimizer      masters + moments + ŵ + gradients of masters
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from gracec.report.memory import size

KINDS = {
    "masters": "what learns, in float32, quantization scales among it",
    "frozen": "all other parameters of the student",
    "w_hat": "quantized weights as the graph reads them",
    "moments": "the two of AdamW",
    "best": "the best state so far",
    "gradients": "of weights as the graph reads them, or of masters",
    "gathered": "what a shard of others is needed in full, at once",
    "original": "the model as it was given",
    "teacher": "its parameters",
    "taught": "what the teacher said of every micro-batch of the step",
    "batches": "ids and pixels of every micro-batch of the step",
    "activations": "what forward keeps for backward",
    "temporary": "chunks of logits, gradients on their way, a block that is computed again",
}
"""Kind of memory -> what it is, in the order of tables."""


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides about memory and time, and not about what is learned.

    Attributes:
        micro_batch_size: samples in memory at once, on each device.
        precision: of the matmuls.
        checkpointing: whether decoder blocks are computed again in the backward pass.
        strategy: "sharded" where the devices share out weights, gradients and moments, "ddp" where
            each has all of them; None for one device.
        teacher_cache: whether what the teacher says is read from files, or the folder of these.
    """

    micro_batch_size: int
    precision: str = "float32"
    checkpointing: bool = False
    strategy: Literal["ddp", "sharded"] | None = None
    teacher_cache: bool | str = False

    @property
    def sharded(self) -> bool:
        return self.strategy == "sharded"

    def fields(self) -> dict[str, Any]:
        """Fields of the `training` section of a recipe."""
        found: dict[str, Any] = {"micro_batch_size": self.micro_batch_size}
        found["precision"] = self.precision
        if self.checkpointing:
            found["activation_checkpointing"] = "blocks"
        if self.strategy is not None:
            found["strategy"] = self.strategy
        if self.teacher_cache:
            found["teacher_cache"] = self.teacher_cache
        return found

    def lines(self) -> str:
        """To be pasted into a recipe."""
        said = {**self.fields()}
        if self.teacher_cache:  # a folder may have any name
            said["teacher_cache"] = json.dumps(self.teacher_cache)
        fields = ", ".join(f"{name}: {value}" for name, value in said.items())
        return f"training: {{{fields}}}"


@dataclass(frozen=True)
class Planned:
    """A setting and what it takes.

    Attributes:
        bytes: kind -> bytes of one device at the highest point.
        peak_at: which time of a step that is.
        student_seconds, teacher_seconds: of an optimizer step.
        filling_seconds: of the teacher for its cache, shared out among all steps.
    """

    setting: Setting
    bytes: Mapping[str, int]
    peak_at: str
    student_seconds: float
    teacher_seconds: float
    filling_seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes of one device."""
        return sum(self.bytes.values())

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return self.student_seconds + self.teacher_seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "training": self.setting.fields(),
            "bytes": dict(self.bytes),
            "peak": self.peak,
            "peak_at": self.peak_at,
            "seconds_a_step": self.seconds,
            "student_seconds": self.student_seconds,
            "teacher_seconds": self.teacher_seconds,
            "filling_seconds": self.filling_seconds,
        }


@dataclass(frozen=True)
class PlannedCache:
    """What the teacher says of all samples, in files.

    Attributes:
        sample_bytes: on the disk, of a sample on average.
        samples: how many there are; None where that is not known.
        sample_seconds: in which all devices together answer one sample.
    """

    sample_bytes: int
    samples: int | None
    sample_seconds: float

    @property
    def bytes(self) -> int | None:
        """On the disk."""
        return None if self.samples is None else self.samples * self.sample_bytes

    def line(self) -> str:
        """For people."""
        each = f"{size(self.sample_bytes)} a sample"
        if self.bytes is None or self.samples is None:
            return f"{each}, written once in {self.sample_seconds:.3g} s"
        whole = f"{size(self.bytes)} for {self.samples:,} samples ({each})"
        return f"{whole}, written once in {_duration(self.samples * self.sample_seconds)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "bytes": self.bytes}


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a training.

    Attributes:
        devices, memory: how many, and bytes of each.
        tflops: what a device computes in a second in matmuls, by dtype, in 10^12 operations.
        bandwidth: bytes of memory that it reads and writes in a second, in 10^9.
        new_memory: bytes that the system gives it for large tensors, likewise; None where that
            takes no time.
        samples: where tokens were counted.
        tokens, mean_tokens: of the longest sample, and on average.
        visual, supervised: tokens of the longest sample that are of pictures, and that are learned.
        batch_size: samples of an optimizer step.
        steps: of the training; None where the number of samples is not known.
        parameters, quantized, learning: numbers of the student, scales not counted.
        operations: of a sample of the mean length: teacher, forward, backward, and forward of the
            decoder blocks alone.
        wanted: the recipe as it is.
        otherwise: the same with `teacher_cache` where the recipe has none, and without where it
            has one; None where nothing can be cached.
        cache: None likewise.
        settings: others that fit, best first.
        refused: the least that was too much, where nothing fits.
    """

    model: str
    teacher: str
    recipe: str
    device: str
    devices: int
    memory: int
    tflops: Mapping[str, float]
    bandwidth: float
    new_memory: float | None
    samples: str
    tokens: int
    mean_tokens: float
    visual: int
    supervised: int
    batch_size: int
    steps: int | None
    parameters: int
    quantized: int
    learning: int
    operations: Mapping[str, int]
    wanted: Planned
    otherwise: Planned | None
    cache: PlannedCache | None
    settings: tuple[Planned, ...]
    refused: Planned | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the recipe as it is does."""
        return self.wanted.peak <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {**asdict(self), "fits": self.fits, "wanted": self.wanted.to_dict()}
        found["otherwise"] = None if self.otherwise is None else self.otherwise.to_dict()
        found["cache"] = None if self.cache is None else self.cache.to_dict()
        found["settings"] = [one.to_dict() for one in self.settings]
        found["refused"] = None if self.refused is None else self.refused.to_dict()
        return found

    def head(self) -> list[str]:
        """What is planned, for people."""
        devices = f"{self.devices} device{'s' * (self.devices > 1)} of {size(self.memory)}"
        of_teacher = f" from {self.teacher}" if self.teacher else ""
        steps = "" if self.steps is None else f", {self.steps:,} steps"
        return [
            f"{self.recipe} of {self.model}{of_teacher} on {devices} ({self.device})",
            f"parameters  {self.parameters:,}, of which {self.quantized:,} are quantized and "
            f"{self.learning:,} learn",
            f"samples     up to {self.tokens:,} tokens, {self.mean_tokens:,.0f} on average; the "
            f"longest has {self.visual:,} of pictures and {self.supervised:,} that are learned",
            f"            ({self.samples})",
            f"a step      {self.batch_size} samples{steps}",
        ]

    def bytes_table(self) -> Table:
        """Bytes of every kind: of the recipe as it is, and of the best that fits."""
        best = [one for one in self.settings[:1] if one.setting != self.wanted.setting]
        best = best or ([self.refused] if self.refused is not None else [])
        columns = [self.wanted, *best]
        table = Table("memory of one device", *(_short(one.setting) for one in columns))
        for column in table.columns[1:]:
            column.justify = "right"
        for kind, what in KINDS.items():
            counts = [one.bytes.get(kind, 0) for one in columns]
            if any(counts):
                table.add_row(f"{kind}: {what}", *map(size, counts))
        table.add_section()
        table.add_row("at the highest point", *(size(one.peak) for one in columns))
        return table

    def settings_table(self) -> Table:
        """Settings that fit, best first."""
        cached = any(one.setting.teacher_cache for one in self.settings)
        last = ["filling the cache"] * cached
        table = Table("fits", "peak", "seconds a step", "of it teacher", *last)
        for column in table.columns[1:]:
            column.justify = "right"
        for one in self.settings:
            share = one.teacher_seconds / one.seconds if one.seconds else 0.0
            filling = f"+ {one.filling_seconds:.3g}" if one.setting.teacher_cache else ""
            cells = [size(one.peak), f"{one.seconds:.3g}", f"{share:.0%}", *[filling] * cached]
            table.add_row(one.setting.lines(), *cells)
        return table

    def verdict(self) -> list[str]:
        """Whether it fits, and how long it takes, for people."""
        wanted, memory = self.wanted, size(self.memory)
        share = wanted.teacher_seconds / wanted.seconds if wanted.seconds else 0.0
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in self.tflops.items())
        rates = f"TFLOP/s: {rates}; {self.bandwidth:.3g} GB/s"
        if self.new_memory is not None:
            rates += f", {self.new_memory:.3g} of new memory"
        lines = [
            f"as it is    {size(wanted.peak)} at the highest point ({wanted.peak_at}), which "
            f"{'fits' if self.fits else f'does not fit {memory}'}",
            f"            {wanted.seconds:.3g} s a step, {share:.0%} of it the teacher, by "
            f"operations and memory read ({rates})",
        ]
        if self.steps is not None:
            lines.append(f"            {_duration(wanted.seconds * self.steps)} for all steps")
        if self.otherwise is not None and self.cache is not None:
            other, kept = (
                self.otherwise,
                "with" if self.otherwise.setting.teacher_cache else "without",
            )
            fits = "fits" if other.peak <= self.memory else "does not fit"
            lines += [
                f"            {kept} teacher_cache: {size(other.peak)} ({other.peak_at}), which "
                f"{fits}; {other.seconds:.3g} s a step",
                f"the cache   {self.cache.line()}",
            ]
        if self.refused is not None:
            lines.append(
                f"nothing fits {memory}: {self.refused.setting.lines()} takes "
                f"{size(self.refused.peak)}"
            )
        return [*lines, *self.notes]


def _short(setting: Setting) -> str:
    parts = [setting.precision, f"micro-batch {setting.micro_batch_size}"]
    parts += ["blocks again"] * setting.checkpointing
    parts += [setting.strategy] if setting.strategy is not None else []
    parts += ["teacher cache"] * bool(setting.teacher_cache)
    return "\n".join(parts)


def _duration(seconds: float) -> str:
    """ "2.5 h": in the largest unit of which there is one."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
