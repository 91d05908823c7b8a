"""What a teacher says of each sample, computed once and kept in files for later epochs and runs.

    cached = cached_teacher(teacher, parts, rule, "teachers", fingerprint=..., processor=...)
    cached.teacher(micro)       in the place of the teacher's own

    teachers/TEACHER/about.json             what decides it, and with what it was begun
    teachers/TEACHER/3f/3f9c....safetensors of one sample: what goes into the head at the supervised
                                            positions, as the teacher computes it, and the centred
                                            Gram matrix of each image, float32, its upper triangle
    teachers/TEACHER/whole/DATA.json        some data, all samples of which are there

TEACHER is a digest of the teacher's tensors, configuration and dtype and of the processor; a sample
is a digest of its tokens, of the positions that are supervised and of its pictures. So runs of any
recipe find what another has computed, and of a run that was stopped everything that it wrote is
used: a file is there as a whole or not at all.

Samples are computed one by one, without padding: what is kept does not depend on who computed it,
and in what batch. That is before training, so that the teacher's decoder can go: its head stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import Tensor

from gracec.data.collate import EmptyBatch
from gracec.directories import cannot_write, write_file
from gracec.errors import GracecError, first_line
from gracec.json_files import JsonModel, check_fields, parse_json
from gracec.objective import Grams, LazyLogits, Outputs, grams_of
from gracec.recipe import Training
from gracec.training.checkpoints.fingerprint import describe_device, fingerprint_of_json
from gracec.training.learner import Learner
from gracec.training.loader import Batches
from gracec.training.micro_batch import MicroBatch
from gracec.training.progress import Shown, shown
from gracec.training.samples import Samples

FORMAT = 1
LOOKED_AT = 16
"""Samples that the size of what is going to be written is told from."""
_ABOUT, _WHOLE = "about.json", "whole"


class Said(NamedTuple):
    """What a teacher says of one sample.

    Attributes:
        head_input: [S, d], in the dtype of the teacher.
        grams: float32 or float64 [n, n] of each image; None where the relations were not asked for.
    """

    head_input: Tensor
    grams: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Part:
    """Some data, all samples of which are looked up.

    Attributes:
        batches: of its samples, by number.
        samples: how many there are.
        fingerprint: of its samples and how they are read.
    """

    batches: Batches
    samples: int
    fingerprint: str

    @classmethod
    def of(cls, samples: Samples, batches: Batches, rule: Training) -> Part:
        """Of these samples, as this training reads them."""
        decides = [samples.data.fingerprint, rule.max_length, rule.labels]
        return cls(batches, len(samples), fingerprint_of_json(decides))


@dataclass(frozen=True)
class CachedTeacher:
    """Answers as a teacher does, from files, with nothing but its head in memory.

    Attributes:
        vocabulary: as that of a `Learner`.
        logits: of no position: its head, and what follows it.
    """

    cache: TeacherCache
    logits: LazyLogits
    vocabulary: int | None

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds in memory."""
        held = self.logits.weight, self.logits.bias
        return tuple(one for one in held if one is not None)

    @torch.no_grad()
    def __call__(self, micro: MicroBatch) -> Outputs:
        """What the teacher says of a micro-batch: logits that are not computed yet and, where the
        micro-batch tells its images, their `Grams`.

        Raises:
            GracecError: if one of its samples is not there.
        """
        device, images = self.logits.weight.device, micro.image_sizes is not None
        said = [self.cache.read(key, images=images) for key in _keys(micro)]
        given = torch.cat([one.head_input for one in said]).to(device)
        logits = LazyLogits(given, self.logits.weight, self.logits.bias, self.logits.after)
        if not images:
            return Outputs(logits)
        matrices = (gram.to(device) for one in said for gram in one.grams or ())
        return Outputs(logits, Grams(tuple(matrices)))


@dataclass(frozen=True)
class Cached:
    """A teacher in files, and what is to be said of them.

    Attributes:
        read, computed: samples that were there, and that were added.
    """

    teacher: CachedTeacher
    read: int
    computed: int
    notes: tuple[str, ...]


def folder_of(asked: str | bool) -> Path:
    """The folder that a recipe names; of `true` one among the user's caches."""
    if isinstance(asked, str):
        return Path(asked).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "gracec" / "teachers"


def cached_teacher(
    teacher: Learner,
    parts: Sequence[Part],
    rule: Training,
    folder: Path,
    *,
    fingerprint: str,
    processor: Mapping[str, Any],
    progress: bool = False,
) -> Cached:
    """Have a teacher say what is not in the folder yet of all samples, each rank its share.

    Args:
        fingerprint: of the teacher's tensors.
        processor: its configuration.
        progress: show it on standard error, and first what is going to be written.

    Raises:
        GracecError: if the head of the teacher cannot be taken out of its graph; if the files do
            not fit on the disk, or cannot be read or written.
    """
    logits = head_of(teacher)
    cache = TeacherCache.open(folder, teacher, fingerprint, processor)
    images = bool(rule.distillation.omega)
    ranked = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
    counts = torch.zeros(2, dtype=torch.int64)
    left = [part for part in parts if not cache.has(part, images=images)]
    counts[0] += sum(part.samples for part in parts if part not in left) if rank == 0 else 0
    total = sum(part.samples for part in left)
    with shown(progress and rank == 0, "", total) as show:
        work = _Filling(cache, teacher, rule, show, total, ranks)
        for part in left:
            numbers = range(rank, part.samples, ranks)
            counts += torch.tensor(work.fill(part, numbers))
    if ranked:
        at = teacher.model.device
        counts = counts.to(at)
        dist.all_reduce(counts)  # every rank has written its share
    for part in left if rank == 0 else ():
        cache.complete(part, images=images)
    read, computed = counts.tolist()
    said = (
        f"teacher cache {cache.folder}: {read:,} samples were there, {computed:,} were computed",
    )
    kept = CachedTeacher(cache, logits, teacher.vocabulary)
    return Cached(kept, read, computed, said + cache.notes)


def head_of(teacher: Learner) -> LazyLogits:
    """The head of a teacher, with no positions.

    Raises:
        GracecError: if it cannot be taken out of its graph.
    """
    found = teacher.head()
    if found is None:
        raise GracecError(
            "the logits of this teacher cannot be computed from what goes into its head",
            where="training.teacher_cache",
            fix="leave it out",
        )
    return found


class _About(JsonModel):
    """What the file says of the folder of a teacher."""

    format: int
    teacher: str
    config: str
    processor: str
    dtype: str
    device: str
    torch: str
    transformers: str


class _Complete(JsonModel):
    """What a file says of data all samples of which are there."""

    samples: int


@dataclass(frozen=True)
class TeacherCache:
    """The files of one teacher.

    Attributes:
        folder: of this teacher alone.
        notes: what a user should know about them.
    """

    folder: Path
    notes: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, folder: Path, teacher: Learner, fingerprint: str, processor: Mapping[str, Any]
    ) -> TeacherCache:
        """The files of this teacher, made if there are none.

        Raises:
            GracecError: if the folder cannot be read or written.
        """
        config = teacher.model.config.to_dict()
        volatile = ("_name_or_path", "transformers_version")
        text = json.dumps(_without(config, volatile), sort_keys=True, default=str)
        about = _About(
            format=FORMAT,
            teacher=fingerprint,
            config=hashlib.sha256(text.encode()).hexdigest(),
            processor=fingerprint_of_json(dict(processor)),
            dtype=str(teacher.program.dtype).removeprefix("torch."),
            device=describe_device(teacher.model.device),
            torch=str(torch.__version__),
            transformers=transformers.__version__,
        )
        deciding = about.model_dump(exclude={"device", "torch", "transformers"})
        own = folder / fingerprint_of_json(deciding)[:16]
        file = own / _ABOUT
        try:
            (own / _WHOLE).mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_file(file, about.model_dump_json() + "\n")
            content = file.read_text(encoding="utf-8")
        except OSError as error:
            raise cannot_write(own, error) from error
        found = check_fields(
            _About, parse_json(content, where=str(file)), where=str(file), fix=f"remove {own}"
        )
        changed = [
            f"{name} {getattr(found, name)}, not {getattr(about, name)}"
            for name in ("torch", "transformers", "device")
            if getattr(found, name) != getattr(about, name)
        ]
        said = f"the teacher cache {own} was begun with {', '.join(changed)}"
        return cls(own, (f"{said}: what is read may differ in its last bits",) if changed else ())

    def file(self, key: str) -> Path:
        """Where a sample is."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str, *, images: bool) -> bool:
        """Whether a sample is there.

        Args:
            images: whether the relations of its images are asked for.

        Raises:
            GracecError: if its file is damaged.
        """
        file = self.file(key)
        if not file.is_file():
            return False
        with _readable(file), safetensors.safe_open(file, "pt") as tensors:
            return not images or "sizes" in tensors.keys()

    def read(self, key: str, *, images: bool) -> Said:
        """What the teacher says of a sample that has to be there; arguments and errors likewise."""
        file = self.file(key)
        found: dict[str, Tensor] = {}
        if file.is_file():
            with _readable(file):
                found = safetensors.torch.load(file.read_bytes())
        if not found or (images and "sizes" not in found):
            raise GracecError(
                "a sample is not in the teacher's cache",
                where=str(file),
                fix=f"remove {self.folder / _WHOLE}, and it is computed again; "
                "all ranks need the same folder",
            )
        if "sizes" not in found:
            return Said(found["head_input"], None)
        sizes = found["sizes"].tolist()
        parts = found["grams"].split([n * (n + 1) // 2 for n in sizes])
        grams = tuple(_whole(part, n) for part, n in zip(parts, sizes, strict=True))
        return Said(found["head_input"], grams)

    def add(self, key: str, said: Said) -> None:
        """Keep what the teacher says of a sample.

        Raises:
            GracecError: if it cannot be written.
        """
        tensors = {"head_input": said.head_input.contiguous().cpu()}
        if said.grams is not None:
            triangles = [_triangle(gram.cpu()) for gram in said.grams]
            tensors["grams"] = torch.cat([torch.zeros(0), *triangles])
            tensors["sizes"] = torch.tensor([len(gram) for gram in said.grams], dtype=torch.int64)
        file = self.file(key)
        new = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(exist_ok=True)
            new.write_bytes(safetensors.torch.save(tensors))
            new.replace(file)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise cannot_write(file, error) from error

    def has(self, part: Part, *, images: bool) -> bool:
        """Whether all samples of some data are known to be there."""
        file = self._whole(part, images)
        if not file.is_file():
            return False
        fields = parse_json(file.read_text(encoding="utf-8"), where=str(file))
        found = check_fields(_Complete, fields, where=str(file), fix="remove it")
        return found.samples == part.samples

    def complete(self, part: Part, *, images: bool) -> None:
        """Note that all samples of some data are there."""
        write_file(self._whole(part, images), _Complete(samples=part.samples).model_dump_json())

    def _whole(self, part: Part, images: bool) -> Path:
        # Another version of transformers may read the same data as other tokens.
        decides = [part.fingerprint, images, transformers.__version__]
        return self.folder / _WHOLE / f"{fingerprint_of_json(decides)[:32]}.json"


@dataclass
class _Filling:
    """Computes what is missing."""

    cache: TeacherCache
    teacher: Learner
    rule: Training
    show: Shown
    total: int
    ranks: int
    done: int = 0
    told: bool = False

    def fill(self, part: Part, numbers: Sequence[int]) -> tuple[int, int]:
        """Samples that were there, and that were not, of these of some data."""
        read = computed = 0
        images = bool(self.rule.distillation.omega)
        samples = self._samples(part, numbers)
        while some := list(islice(samples, LOOKED_AT)):
            missing = [one for one in some if not self.cache.holds(one[0], images=images)]
            if missing and not self.told:
                self._tell([micro for _, micro in missing])
            for key, micro in missing:
                self.cache.add(key, said_of(self.teacher, micro))
            read, computed = read + len(some) - len(missing), computed + len(missing)
            self.done = min(self.done + len(some) * self.ranks, self.total)
            text = f"teacher cache {self.done}/{self.total}"
            self.show(text, self.done, self.total, due=self.done == self.total)
        return read, computed

    def _samples(self, part: Part, numbers: Sequence[int]) -> Iterator[tuple[str, MicroBatch]]:
        """Each sample alone, without those that are broken."""
        groups: Iterable[Sequence[int]] = ([number] for number in numbers)
        for batch in part.batches(groups):
            if not isinstance(batch, EmptyBatch):
                micro = MicroBatch.read(
                    self.teacher.model,
                    batch,
                    images=bool(self.rule.distillation.omega),
                    everywhere=self.rule.labels == "all",
                )
                yield _keys(micro)[0], micro

    def _tell(self, some: Sequence[MicroBatch]) -> None:
        """Say what is going to be written, before anything is; refuse what the disk cannot hold."""
        self.told = True
        each = sum(bytes_on_disk(self.teacher, micro) for micro in some) / len(some)
        whole, free = round(each * self.total), shutil.disk_usage(self.cache.folder).free
        text = (
            f"the teacher's answers to {self.total:,} samples take about {_in_words(whole)} in "
            f"{self.cache.folder}, less what is there ({_in_words(round(each))} a sample)"
        )
        self.show(text, 0, self.total, due=True)
        if each * (self.total - self.done) > free:
            raise GracecError(
                f"{text}, and there are {_in_words(free)} free",
                where="training.teacher_cache",
                fix="name another folder, or train without it",
            )


@torch.no_grad()
def said_of(teacher: Learner, micro: MicroBatch) -> Said:
    """What a teacher says of a micro-batch of one sample, as files keep it."""
    outputs = teacher(micro)
    assert isinstance(outputs.logits, LazyLogits)
    if micro.image_index is None or micro.image_sizes is None:
        return Said(outputs.logits.hidden, None)
    assert isinstance(outputs.hidden, Tensor)
    grams = grams_of(outputs.hidden, micro.image_index, micro.image_sizes)
    return Said(outputs.logits.hidden, grams.matrices)


def _keys(micro: MicroBatch) -> tuple[str, ...]:
    if micro.keys is None:
        raise GracecError(
            "the batch does not say which pictures its samples have",
            where="training.teacher_cache",
            fix="make it with Collator(..., names_pictures=True)",
        )
    return micro.keys


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """One line for a file that is damaged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = f"not readable: {first_line(error)}"
        raise GracecError(reason, where=str(file), fix="remove it") from error


def _triangle(gram: Tensor) -> Tensor:
    """The upper triangle [n (n + 1) / 2] of a symmetric matrix [n, n]."""
    rows, columns = torch.triu_indices(len(gram), len(gram))
    return gram[rows, columns]


def _whole(triangle: Tensor, size: int) -> Tensor:
    """The symmetric matrix [n, n] of an upper triangle."""
    rows, columns = torch.triu_indices(size, size)
    found = triangle.new_empty(size, size)
    found[rows, columns] = triangle
    found[columns, rows] = triangle
    return found


def bytes_on_disk(teacher: Learner, micro: MicroBatch) -> int:
    """What the files of the samples of a micro-batch hold."""
    triangles = sum(n * (n + 1) // 2 for n in micro.image_sizes or ())
    return _head_inputs(teacher, micro) + 4 * triangles


def bytes_read(teacher: Learner, micro: MicroBatch) -> int:
    """What a `CachedTeacher` says of a micro-batch."""
    return _head_inputs(teacher, micro) + 4 * sum(n * n for n in micro.image_sizes or ())


def _head_inputs(teacher: Learner, micro: MicroBatch) -> int:
    width = teacher.model.config.get_text_config().hidden_size
    return len(micro.index) * int(width) * teacher.program.dtype.itemsize


def _in_words(count: int) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e8 else f"{count / 1e6:,.3g} MB"


def _without(fields: Any, names: Sequence[str]) -> Any:
    """A configuration without these fields, at any depth."""
    if isinstance(fields, dict):
        return {name: _without(one, names) for name, one in fields.items() if name not in names}
    return [_without(one, names) for one in fields] if isinstance(fields, list) else fields
