"""Training data: conversations about pictures, read lazily, and batches with labelled answers.

    data = open_train_data("llava.jsonl")            # every record is checked, no picture decoded
    train, held_out = data.split(0.1, seed=0)        # no picture on both sides
    collate = Collator(processor, model, max_length=2048)
    batch = collate([train.sample(index) for index in (3, 1, 2)])

Data is not trusted. Pictures are read from below the image root only, in a few common formats, up
to a limit of pixels; nothing is unpickled and nothing is fetched. A record that cannot be used is a
`BrokenSample` with its reason: counted, reported, and left out, when the data is opened or, if only
decoding its picture shows it, of its batch. In strict mode, or when more than half of the records
are broken, it is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from gracec.errors import GracecError, GracecWarning
from gracec.evaluate.data import SAMPLES_FILE
from gracec.objective.labels import IGNORE_INDEX

IMAGE_PLACEHOLDER = "<image>"
MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded (8192 x 8192: 192 MiB of RGB)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What pictures may be stored as. Pillow knows more; some of those start other programs."""

FOLDER_FILES = ("train.jsonl", "train.json", "data.jsonl", "data.json", SAMPLES_FILE)
"""What is looked for in a folder, in this order."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES["system"] = "system"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates and processors raise for input that they do not take.
_REFUSALS = (ValueError, TypeError, KeyError, IndexError, RuntimeError, TemplateError)
# What Pillow's decoders raise for broken files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """One message. `role` is user, assistant or system; pictures stand in `text` as `<image>`."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation that ends with an answer, its RGB pictures in the order of their placeholders,
    and the record it comes from, which errors name."""

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    where: str = ""


@dataclass(frozen=True)
class BrokenSample:
    """A record that cannot be trained on: where it is, what kind of fault, and the fault itself."""

    where: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class EmptyBatch(GracecError):
    """Broken samples were left out of a batch, and nothing to train on is left: take the next."""


class _Broken(Exception):
    """Raised inside this file while a record is read; becomes a `BrokenSample`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


# --- Opening -------------------------------------------------------------------------------------


def open_train_data(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    image_root: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> TrainData:
    """Open training data and check every record, without decoding a picture.

    Args:
        source: a `.json` or `.jsonl` file of conversations; a folder with one (`FOLDER_FILES`), a
            folder written by `datasets.Dataset.save_to_disk`, or one of parquet shards; a
            `datasets.Dataset`; or a sequence of records. `docs/training-data.md` shows them.
        image_root: folder that image paths are relative to and may not leave; by default that of
            the file or the folder itself. A sequence has none.
        strict: whether a broken record is an error.

    Raises:
        GracecError: if the source cannot be read or is empty, if more than half of its records are
            broken, or, in strict mode, if one is.
    """
    opened = _open_source(source)
    root = opened.folder if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise GracecError("the image root is not a folder", where=str(root))
    if len(opened) == 0:
        raise GracecError("no records", where=opened.name)
    ledger = _Ledger(opened.name, len(opened), strict)
    reader = _Reader(opened, None if root is None else root.resolve(), ledger)
    return reader.scan()


@dataclass(frozen=True)
class _Reader:
    """Reads and checks single records; `root` is resolved."""

    source: _Source
    root: Path | None
    ledger: _Ledger

    def scan(self) -> TrainData:
        """Look at every record once: what is broken, the pictures of each, and the fingerprint."""
        digest = hashlib.sha256(b"gracec training data 1\n" + self.source.digest())
        sizes: dict[str, int | _Broken] = {}
        keys: list[tuple[int, ...]] = []
        for number in range(len(self.source)):
            own: list[int] = []
            try:
                _, images = self._parse(number)
                for image in images:
                    identity = self._identity(image, sizes)
                    digest.update(identity)
                    own.append(int.from_bytes(hashlib.sha256(identity).digest()[:8], "big"))
            except _Broken as broken:
                digest.update(b"broken\n")
                self.ledger.add(number, self._broken(number, broken), warn=False)
            keys.append(tuple(own))
        self.ledger.warn_summary()
        left_out = tuple(sorted(self.ledger.broken))
        usable = tuple(number for number in range(len(keys)) if number not in self.ledger.broken)
        return TrainData(self, usable, left_out, tuple(keys), digest.hexdigest())

    def sample(self, number: int) -> Sample | BrokenSample:
        known = self.ledger.broken.get(number)
        if known is not None:
            return known
        try:
            turns, images = self._parse(number)
            decoded = tuple(self._decode(image) for image in images)
        except _Broken as broken:
            found = self._broken(number, broken)
            self.ledger.add(number, found)
            return found
        return Sample(turns, decoded, self.source.where(number))

    def _broken(self, number: int, broken: _Broken) -> BrokenSample:
        return BrokenSample(self.source.where(number), broken.kind, broken.reason)

    def _parse(self, number: int) -> tuple[tuple[Turn, ...], list[_ImageRef]]:
        record = self.source.record(number)
        images = _image_refs(record)
        turns = _turns(record, len(images))
        _check_turns(turns, len(images))
        return turns, images

    def _identity(self, image: _ImageRef, sizes: dict[str, int | _Broken]) -> bytes:
        """What tells one picture from another without decoding it: its name and size in bytes."""
        if isinstance(image, Image.Image):
            return b"pixels " + _pixel_digest(image) + b"\n"
        if isinstance(image, _Embedded):
            name = image.name or hashlib.sha256(image.head()).hexdigest()
            return json.dumps([name, image.size]).encode() + b"\n"
        if image not in sizes:
            try:
                sizes[image] = self._confined(image)[1]
            except _Broken as broken:
                sizes[image] = broken
        size = sizes[image]
        if isinstance(size, _Broken):
            raise size
        return json.dumps([image, size]).encode() + b"\n"

    def _confined(self, name: str) -> tuple[Path, int]:
        """The file of a picture below the image root, and its size in bytes."""
        if self.root is None:
            raise GracecError(
                f"image {name!r} is a path, and there is no folder to look in",
                where=self.source.name,
                fix="pass image_root",
            )
        if "://" in name or name.startswith("data:"):
            raise _Broken("image path", f"image {_short(name)} is an address, nothing is fetched")
        flavours = (PurePosixPath(name), PureWindowsPath(name))
        if any(path.is_absolute() or path.drive or path.root for path in flavours):
            raise _Broken("image path", f"image {_short(name)} is an absolute path")
        if any(".." in path.parts for path in flavours):
            raise _Broken("image path", f'image {_short(name)} has ".." in its path')
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise _Broken("image path", f"image {_short(name)} leads out of the image root")
            found = path.stat()
        except FileNotFoundError as error:
            raise _Broken("missing image", f"image {_short(name)} does not exist") from error
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
            raise _Broken(
                "missing image", f"image {_short(name)} cannot be read ({_first_line(error)})"
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise _Broken("missing image", f"image {_short(name)} is not a file")
        return path, found.st_size

    def _decode(self, image: _ImageRef) -> Image.Image:
        if isinstance(image, Image.Image):
            return _to_rgb(image, "the image")
        if isinstance(image, _Embedded):
            return _open_image(io.BytesIO(image.bytes()), f"image {_short(image.name)}")
        return _open_image(self._confined(image)[0], f"image {_short(image)}")


@dataclass(frozen=True)
class _Ledger:
    """The broken records of a source, and what becomes of them."""

    name: str
    total: int
    strict: bool
    broken: dict[int, BrokenSample] = field(default_factory=dict)

    def add(self, number: int, sample: BrokenSample, *, warn: bool = True) -> None:
        first = all(sample.kind != other.kind for other in self.broken.values())
        self.broken[number] = sample
        if self.strict:
            raise GracecError(sample.reason, where=sample.where)
        if 2 * len(self.broken) > self.total:
            earliest = self.broken[min(self.broken)]
            raise GracecError(
                f"more than half of the {self.total} samples are broken (such as {earliest})",
                where=self.name,
                fix="mend the data",
            )
        if warn and first:
            warnings.warn(
                f"{sample} ({sample.kind}); samples like this are left out",
                GracecWarning,
                stacklevel=2,
            )

    def warn_summary(self) -> None:
        if not self.broken:
            return
        kinds: dict[str, list[BrokenSample]] = {}
        for sample in self.broken.values():
            kinds.setdefault(sample.kind, []).append(sample)
        listed = "; ".join(f"{len(group)} {kind} ({group[0]})" for kind, group in kinds.items())
        warnings.warn(
            f"{len(self.broken)} of {self.total} samples are broken and left out: {listed}",
            GracecWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class TrainData:
    """Samples by number, read when asked for.

    fingerprint: SHA-256, in hex, of the records and of the name and the size in bytes of every
        picture. Records are hashed as the bytes of their file, or as the fingerprint and the files
        that `datasets` keeps; pictures in memory by their pixels. It does not depend on where the
        data lies, and does not see a picture that was replaced by another of the same size.
    """

    _reader: _Reader
    _numbers: tuple[int, ...]
    _left_out: tuple[int, ...]
    _keys: tuple[tuple[int, ...], ...]
    fingerprint: str

    def __len__(self) -> int:
        """The number of samples, without those that were found to be broken when opening."""
        return len(self._numbers)

    def sample(self, index: int) -> Sample | BrokenSample:
        """Sample `index`, 0 <= index < len, with its pictures decoded: RGB and upright.

        A `BrokenSample` if a picture cannot be decoded, or is no longer there.

        Raises:
            GracecError: if it is broken and the data strict; if more than half of all samples are
                now known to be broken; if the file has changed since it was opened.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._reader.sample(self._numbers[index])

    @property
    def problems(self) -> list[str]:
        """A line for each record known to be broken: where, and why.

        After a split, those that were left out when opening are listed by the first part.
        """
        broken = self._reader.ledger.broken
        numbers = sorted((*self._left_out, *self._numbers))
        return [str(broken[number]) for number in numbers if number in broken]

    def split(self, share: float, seed: int) -> tuple[TrainData, TrainData]:
        """(train, held out): about `share` of the samples are held out.

        Samples that have a picture in common, directly or through others, stay on one side. What is
        drawn depends on the seed and the pictures' names and sizes, not on the order of records (a
        sample without pictures is drawn by its position).

        Raises:
            GracecError: if `share` is not between 0 and 1, or if one side would be empty.
        """
        if not 0 < share < 1:
            raise GracecError(f"the share to hold out must be between 0 and 1, not {share}")
        groups = _connected([self._keys[number] for number in self._numbers])
        drawn = sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
        target = min(max(1, round(share * len(self))), len(self) - 1)
        held: list[int] = []
        for key in drawn:
            if len(held) + len(groups[key]) <= target:
                held += groups[key]
        if not held:  # every group is larger than the share
            held = groups[min(drawn, key=lambda key: len(groups[key]))]
        if len(held) == len(self):
            raise GracecError(
                "cannot be split: the samples share their pictures, or there is one only",
                where=self._reader.ledger.name,
            )
        chosen = set(held)
        rest = [index for index in range(len(self)) if index not in chosen]
        return self._part(rest, self._left_out), self._part(sorted(held), ())

    def _part(self, indices: Sequence[int], left_out: tuple[int, ...]) -> TrainData:
        numbers = tuple(self._numbers[index] for index in indices)
        digest = hashlib.sha256(f"{self.fingerprint} {numbers}".encode()).hexdigest()
        return TrainData(self._reader, numbers, left_out, self._keys, digest)


def _connected(keys: Sequence[tuple[int, ...]]) -> dict[str, list[int]]:
    """Positions grouped so that those with a key in common are together (union-find).

    A group is named by its smallest key; a position without keys is a group of its own.
    """
    parent: dict[int, int] = {}

    def find(key: int) -> int:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for own in keys:
        for key in own[1:]:
            low, high = sorted((find(own[0]), find(key)))
            parent[high] = low
    groups: dict[str, list[int]] = {}
    for position, own in enumerate(keys):
        name = f"image {find(own[0])}" if own else f"sample {position}"
        groups.setdefault(name, []).append(position)
    return groups


# --- Where records come from ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Embedded:
    """An encoded picture inside a record; `data` is bytes, or a buffer of pyarrow."""

    name: str
    data: Any

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else int(self.data.size)

    def head(self) -> bytes:
        return bytes(memoryview(self.data)[: 1 << 16])

    def bytes(self) -> bytes:
        return bytes(memoryview(self.data))


_ImageRef = str | _Embedded | Image.Image


class _Source(Protocol):
    """Records by number. `name` and `where` are for messages, `folder` is the image root."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    def __len__(self) -> int: ...

    def where(self, number: int) -> str: ...

    def record(self, number: int) -> Mapping[str, Any]: ...

    def digest(self) -> bytes: ...


def _open_source(source: Any) -> _Source:
    if not isinstance(source, str | os.PathLike):
        return _in_memory(source)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".jsonl":
        return _JsonLines.open(path)
    if path.suffix == ".json":
        return _open_json(path)
    if not path.exists():
        raise GracecError("does not exist", where=str(path), fix="give training data")
    raise GracecError(
        "not training data", where=str(path), fix="give a .json or .jsonl file, or a folder"
    )


def _open_folder(path: Path) -> _Source:
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return _open_source(path / name)
    if (path / "dataset_dict.json").is_file():
        return _Arrow.saved(_train_split(path), path)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _Arrow.saved(path, path)
    shards = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    # A folder with all splits names the shards after them.
    shards = [shard for shard in shards if shard.name.startswith("train")] or shards
    if shards:
        return _Arrow.parquet(shards, path)
    raise GracecError(
        "no training data in this folder",
        where=str(path),
        fix=f"put one of {', '.join(FOLDER_FILES)}, a saved dataset or parquet files there",
    )


def _train_split(path: Path) -> Path:
    """The folder of the training split of a saved `datasets.DatasetDict`."""
    found = sorted(file.parent.name for file in path.glob("*/state.json"))
    if found == ["train"] or "train" in found:
        return path / "train"
    raise GracecError(
        f"no split is called train (found {', '.join(found) or 'none'})",
        where=str(path),
        fix="give the folder of one split",
    )


@dataclass(frozen=True)
class _JsonLines:
    """One record a line. Offsets are kept; a line is read and parsed when it is asked for."""

    file: Path
    offsets: array[int]
    lines: array[int]
    content: bytes
    stamp: tuple[int, int]

    @classmethod
    def open(cls, file: Path) -> _JsonLines:
        offsets, lines = array("Q"), array("Q")
        content = hashlib.sha256()
        offset = 0
        try:
            with file.open("rb") as stream:
                stamp = _stamp(stream.fileno())
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        offsets.append(offset)
                        lines.append(number)
                    offset += len(line)
                    content.update(line)
        except OSError as error:
            raise GracecError(f"cannot be read ({error.strerror})", where=str(file)) from error
        return cls(file, offsets, lines, content.digest(), stamp)

    @property
    def name(self) -> str:
        return str(self.file)

    @property
    def folder(self) -> Path | None:
        return self.file.parent

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, number: int) -> str:
        return f"{self.file}:{self.lines[number]}"

    def digest(self) -> bytes:
        return self.content

    def record(self, number: int) -> Mapping[str, Any]:
        # Opened each time: a file that stays open shares its position with forked processes.
        try:
            with self.file.open("rb") as stream:
                if _stamp(stream.fileno()) != self.stamp:
                    raise GracecError("has changed since it was opened", where=str(self.file))
                stream.seek(self.offsets[number])
                line = stream.readline()
        except OSError as error:
            raise GracecError(f"cannot be read ({error.strerror})", where=str(self.file)) from error
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg}, column {error.colno})"
            raise _Broken("not a record", reason) from error
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
            raise _Broken("not a record", reason) from error
        return _mapping(parsed)


@dataclass(frozen=True)
class _Records:
    """Records that are in memory."""

    name: str
    folder: Path | None
    records: Sequence[Any]
    content: bytes

    def __len__(self) -> int:
        return len(self.records)

    def where(self, number: int) -> str:
        return f"{self.name}: record {number}" if self.folder else f"record {number}"

    def digest(self) -> bytes:
        return self.content

    def record(self, number: int) -> Mapping[str, Any]:
        return _mapping(self.records[number])


def _open_json(file: Path) -> _Records:
    try:
        content = file.read_bytes()
        parsed = json.loads(content)
    except OSError as error:
        raise GracecError(f"cannot be read ({error.strerror})", where=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise GracecError(f"not valid JSON ({_first_line(error)})", where=str(file)) from error
    if not isinstance(parsed, list):
        raise GracecError(
            f"expected a JSON list of records, found {type(parsed).__name__}",
            where=str(file),
            fix="a file with one record a line ends in .jsonl",
        )
    return _Records(str(file), file.parent, parsed, hashlib.sha256(content).digest())


def _in_memory(source: Any) -> _Source:
    if type(source).__module__.partition(".")[0] == "datasets":
        return _Arrow.given(source)
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise GracecError(
            f"training data cannot be a {type(source).__name__}",
            fix="give a path, a sequence of records, or a datasets.Dataset",
        )
    # Pictures are hashed by the scan.
    text = json.dumps(list(source), skipkeys=True, default=lambda value: type(value).__name__)
    return _Records("the records", None, source, hashlib.sha256(text.encode()).digest())


@dataclass(frozen=True)
class _Arrow:
    """A `datasets.Dataset`, read as Arrow: that never decodes or fetches a picture by itself."""

    name: str
    folder: Path | None
    dataset: Any
    content: bytes

    @classmethod
    def saved(cls, path: Path, root: Path) -> _Arrow:
        from datasets import load_from_disk

        with _refusing("the saved dataset", path):
            dataset = load_from_disk(str(path))
        files = sorted(path.glob("*.arrow"))
        content = [dataset._fingerprint, *([file.name, file.stat().st_size] for file in files)]
        return cls.of(str(path), root, dataset, content)

    @classmethod
    def parquet(cls, shards: Sequence[Path], root: Path) -> _Arrow:
        from datasets import Dataset

        with _refusing("the parquet files", root):
            # Not `load_dataset`: that one reports to a server that it was called.
            dataset = Dataset.from_parquet([str(shard) for shard in shards])
        # The last bytes of a parquet file are its table of contents, with statistics.
        content = [[shard.name, shard.stat().st_size, _tail_digest(shard)] for shard in shards]
        return cls.of(str(root), root, dataset, content)

    @classmethod
    def given(cls, dataset: Any) -> _Arrow:
        from datasets import Dataset

        if not isinstance(dataset, Dataset):
            raise GracecError(
                f"training data cannot be a {type(dataset).__name__}",
                fix="give one split: a datasets.Dataset",
            )
        return cls.of("the dataset", None, dataset, [dataset._fingerprint])

    @classmethod
    def of(cls, name: str, folder: Path | None, dataset: Any, content: Sequence[Any]) -> _Arrow:
        text = json.dumps([len(dataset), str(dataset.features), *content])
        digest = hashlib.sha256(text.encode()).digest()
        return cls(name, folder, dataset.with_format("arrow"), digest)

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, number: int) -> str:
        return f"{self.name}: record {number}"

    def digest(self) -> bytes:
        return self.content

    def record(self, number: int) -> Mapping[str, Any]:
        row = self.dataset[number]  # a table of one row
        record: dict[str, Any] = {}
        for name in row.column_names:
            scalar = row.column(name)[0]
            record[name] = _picture(scalar) if name in ("image", "images") else scalar.as_py()
        return record


def _picture(scalar: Any) -> Any:
    """Arrow's picture or list of pictures as references; their bytes stay where they are."""
    if not scalar.is_valid:
        return None
    if hasattr(scalar, "values") and not hasattr(scalar, "keys"):
        return [_picture(item) for item in scalar.values] if scalar.values is not None else []
    if hasattr(scalar, "keys"):
        fields = dict(scalar.items())
        path = fields["path"].as_py() if "path" in fields else None
        data = fields.get("bytes")
        if data is not None and data.is_valid:
            return _Embedded(path or "", data.as_buffer())
        return path
    value = scalar.as_py()
    return _Embedded("", value) if isinstance(value, bytes) else value


class _refusing:
    """with _refusing(what, path): an error of `datasets` inside names the path in one line."""

    def __init__(self, what: str, path: Path) -> None:
        self.what, self.path = what, path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            cause = error.__cause__ or error
            raise GracecError(
                f"{self.what} cannot be read ({_first_line(cause)})", where=str(self.path)
            ) from error


def _tail_digest(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return hashlib.sha256(stream.read()).hexdigest()


def _stamp(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


# --- What a record says --------------------------------------------------------------------------


def _mapping(parsed: Any) -> Mapping[str, Any]:
    if not isinstance(parsed, Mapping):
        raise _Broken("not a record", f"expected an object, found {type(parsed).__name__}")
    return parsed


def _image_refs(record: Mapping[str, Any]) -> list[_ImageRef]:
    value = record.get("images")
    if value is None:
        value = record.get("image")
    if value is None:
        return []
    return [_image_ref(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _image_ref(value: Any) -> _ImageRef:
    if isinstance(value, Mapping):  # as `datasets` stores a picture
        data = value.get("bytes")
        value = value.get("path") if data is None else _Embedded(str(value.get("path") or ""), data)
    elif isinstance(value, bytes):
        value = _Embedded("", value)
    elif isinstance(value, Path):
        value = str(value)
    if isinstance(value, str | _Embedded | Image.Image) and value != "":
        return value
    raise _Broken("image path", f"an image must be a path, not {_short(repr(value))}")


def _turns(record: Mapping[str, Any], images: int) -> tuple[Turn, ...]:
    for key in ("conversations", "messages"):
        value = record.get(key)
        if isinstance(value, Mapping):  # a list of objects as `datasets` may store it: by column
            columns = list(value.values())
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        if value is not None:
            if not isinstance(value, list | tuple) or not value:
                raise _Broken("no conversation", f'"{key}" must be a list that is not empty')
            return tuple(_turn(item) for item in value)
    if "question" in record and "answer" in record:
        question, answer = record["question"], record["answer"]
        if not isinstance(question, str) or not isinstance(answer, str):
            raise _Broken("no conversation", '"question" and "answer" must be texts')
        if IMAGE_PLACEHOLDER not in question:
            question = "\n".join([*[IMAGE_PLACEHOLDER] * images, question])
        return (Turn("user", question.strip()), Turn("assistant", answer.strip()))
    raise _Broken("no conversation", 'there are neither "conversations" nor "messages"')


def _turn(item: Any) -> Turn:
    if not isinstance(item, Mapping):
        raise _Broken("no conversation", f"a turn must be an object, not {type(item).__name__}")
    role = item.get("from") or item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise _Broken("unknown role", f"unknown role {_short(repr(role))} (known: {known})")
    text = item.get("value")
    if text is None:
        text = item.get("content")
    if isinstance(text, list | tuple):
        text = "\n".join(_part(part) for part in text)
    if not isinstance(text, str):
        raise _Broken("no conversation", f"the {role} turn has no text")
    return Turn(_ROLES[role], text.strip())


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE_PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise _Broken("no conversation", "a part of a message must be a text or an image")
    return text


def _check_turns(turns: Sequence[Turn], images: int) -> None:
    spoken = turns[1:] if turns[0].role == "system" else turns
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or [turn.role for turn in spoken] != expected:
        raise _Broken("order of turns", "the turns must be questions and answers in alternation")
    for turn in turns:
        if not turn.text:
            what = "an answer" if turn.role == "assistant" else f"a {turn.role} turn"
            raise _Broken("empty text", f"{what} is empty")
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
            raise _Broken("placeholders", f"{IMAGE_PLACEHOLDER} stands outside a user turn")
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != images:
        raise _Broken(
            "placeholders",
            f"{placeholders} {IMAGE_PLACEHOLDER} in the text for {images} images in the record",
        )


# --- Pictures ------------------------------------------------------------------------------------


def _open_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return _to_rgb(image, name)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _Broken("image too large", f"{name} has more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise _Broken("corrupt image", f"{name} is none of {', '.join(FORMATS)}") from error
    except _DECODE_ERRORS as error:
        raise _Broken(
            "corrupt image", f"{name} cannot be decoded ({_first_line(error)})"
        ) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright RGB pixels; the size is known, and checked, before any is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise _Broken(
            "image too large",
            f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
        )
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except _DECODE_ERRORS as error:
        raise _Broken(
            "corrupt image", f"{name} cannot be decoded ({_first_line(error)})"
        ) from error


def _pixel_digest(image: Image.Image) -> bytes:
    return hashlib.sha256(_to_rgb(image, "the image").tobytes()).digest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _short(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."


# --- Batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One sample as tokens, without padding, and the half-open spans of its answers."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Collator:
    """Samples to a batch, through the processor and the chat template of the model.

    Args:
        processor: of the model; its chat template builds the text, or, where it has none, the
            turns follow each other in lines, as in `gracec.evaluate`.
        model: tells at which tokens generation stops.
        max_length: tokens of the longest sample; longer ones are cut at the end.
        strict: whether a sample that is found to be broken here is an error.

    `problems` has a line for each of them otherwise.

    Raises:
        GracecError: if the processor has no tokenizer, no padding token or no image token, or if
            the model has no token to stop at.
    """

    processor: Any
    model: nn.Module
    max_length: int | None = None
    strict: bool = False
    problems: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        name = type(self.processor).__name__
        if getattr(self.processor, "tokenizer", None) is None:
            raise GracecError("has no tokenizer", where=name, fix="give the model's processor")
        if self._tokenizer.pad_token_id is None:
            raise GracecError(
                "the tokenizer has no padding token", where=name, fix="set tokenizer.pad_token"
            )
        if not isinstance(getattr(self.processor, "image_token", None), str):
            raise GracecError("has no image token", where=name, fix="give the model's processor")
        if self.max_length is not None and self.max_length < 1:
            raise GracecError(f"max_length must be at least 1, not {self.max_length}")
        _ = self._stops  # fails early

    def __call__(self, samples: Sequence[Sample | BrokenSample]) -> Batch:
        """Encode samples; broken ones are left out.

        Returns:
            What the processor makes of them, padded on the right: `input_ids` and `attention_mask`
            int64 [B, T], `pixel_values` (LLaVA: float32 [images, 3, H, W]) and whatever else the
            family takes; and `labels` int64 [B, T], where labels[b, t] is token t if it belongs to
            an answer or ends one, else -100. The shift to the next token is up to the loss.

        Raises:
            EmptyBatch: if, without broken samples, nothing to train on is left.
            GracecError: if no sample has a picture; if the processor or the template refuses a
                sample; if the template writes an answer otherwise than after its own prompt; if
                `max_length` cuts off a part of a picture; in strict mode, if a sample is broken.
        """
        if not samples:
            raise GracecError("a batch needs a sample")
        whole = [sample for sample in samples if isinstance(sample, Sample)]
        usable = [sample for sample in whole if self._is_usable(sample)]
        while usable:
            if not any(sample.images for sample in usable):
                if len(usable) < len(samples):
                    break
                raise GracecError(
                    "no sample of the batch has a picture, which the model needs",
                    where=usable[0].where or "batch",
                    fix="make batches larger, or leave out samples without a picture",
                )
            encoded = self._encode(usable)
            rows = [self._row(encoded, i, sample) for i, sample in enumerate(usable)]
            if all(row is not None for row in rows):
                return self._batch(encoded, [row for row in rows if row is not None])
            # Which pixels belong to a sample is known to the processor only: once more, without.
            usable = [sample for sample, row in zip(usable, rows, strict=True) if row is not None]
        raise EmptyBatch(
            f"broken samples leave {'no picture' if usable else 'nothing'} to train on",
            where=samples[0].where or "batch",
            fix="mend the data, or make batches larger",
        )

    # Before encoding

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        """The tokens that end generation; the first is the one that is appended."""
        model: Any = self.model
        own = self._tokenizer.eos_token_id
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        for holder in (getattr(model, "generation_config", None), text, config):
            found = getattr(holder, "eos_token_id", None)
            if found is not None:
                stops = [found] if isinstance(found, int) else list(found)
                return tuple(sorted(stops, key=lambda stop: stop != own))
        if own is None:
            raise GracecError(
                "neither the model nor the tokenizer has an end-of-sequence token",
                where=type(self.processor).__name__,
                fix="set model.generation_config.eos_token_id",
            )
        return (int(own),)

    @cached_property
    def _image_id(self) -> int:
        found = getattr(self.processor, "image_token_id", None)
        if found is None:
            found = self._tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return int(found)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        tokens = {*self._tokenizer.all_special_tokens, self.processor.image_token}
        return re.compile("|".join(re.escape(str(token)) for token in sorted(tokens)))

    @cached_property
    def _marks_answers(self) -> bool:
        """Whether the template says itself what the model has to generate."""
        template = getattr(self.processor, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        return fast and isinstance(template, str) and bool(_GENERATION.search(template))

    def _is_usable(self, sample: Sample) -> bool:
        for turn in sample.turns:
            found = self._control.search(turn.text.replace(IMAGE_PLACEHOLDER, ""))
            if found:
                self._report(sample, f"the text has {found[0]!r}, a control token of the tokenizer")
                return False
        return True

    def _report(self, sample: Sample, reason: str) -> None:
        if self.strict:
            raise GracecError(reason, where=sample.where)
        first = not self.problems
        line = f"{sample.where or 'sample'}: {reason}"
        if line not in self.problems:
            self.problems.append(line)
        if first:
            warnings.warn(f"{line}; samples like this are left out", GracecWarning, stacklevel=4)

    # Encoding

    def _encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors; an error names the first sample that fails by itself."""
        try:
            return self._encode_together(samples)
        except _REFUSALS as error:
            for sample in samples:
                try:
                    self._encode_together([sample])
                except _REFUSALS as own:
                    raise self._refused(sample, own) from own
            raise GracecError(
                f"the processor refuses the batch ({_first_line(error)})", where=samples[0].where
            ) from error

    def _encode_together(self, samples: Sequence[Sample]) -> dict[str, Any]:
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        if getattr(self.processor, "chat_template", None):
            return dict(
                self.processor.apply_chat_template(
                    [_messages(sample.turns, sample.images) for sample in samples],
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",  # SmolVLM does not look for it among the options
                    return_assistant_tokens_mask=self._marks_answers,
                    processor_kwargs=options,
                )
            )
        texts = [self._text(sample.turns) for sample in samples]
        images = [list(sample.images) for sample in samples]
        return dict(self.processor(images=images, text=texts, **options))

    @staticmethod
    def _refused(sample: Sample, error: BaseException) -> GracecError:
        reason = f"the processor refuses the sample ({_first_line(error)})"
        return GracecError(reason, where=sample.where)

    def _text(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        """The text of some turns, with one placeholder an image; `prompt` asks for an answer."""
        if getattr(self.processor, "chat_template", None):
            rendered: list[str] = self.processor.apply_chat_template(
                [_messages(turns)], add_generation_prompt=prompt
            )
            return rendered[0]
        end = self._tokenizer.convert_ids_to_tokens(self._stops[0])
        lines = []
        for turn in turns:
            parts = _messages([turn])[0]["content"]
            texts = [part.get("text", self.processor.image_token) for part in parts]
            lines.append("\n".join(texts) + (end if turn.role == "assistant" else ""))
        return "\n".join(lines)

    def _special_tokens(self, text: str) -> dict[str, bool]:
        """As `apply_chat_template` does: none are added where the template wrote the first."""
        bos = self._tokenizer.bos_token
        written = getattr(self.processor, "chat_template", None) and bos and text.startswith(bos)
        return {"add_special_tokens": False} if written else {}

    # Answers

    def _row(self, encoded: Mapping[str, Any], index: int, sample: Sample) -> _Row | None:
        """Row `index` of the batch, its answers closed and its length limited; None if broken."""
        mask: Tensor = encoded["attention_mask"][index]
        length = int(mask.sum())
        if not bool(mask[:length].all()):
            raise GracecError("the processor does not pad on the right", where="batch")
        ids: list[int] = encoded["input_ids"][index, :length].tolist()
        if (self._image_id in ids) != bool(sample.images):
            raise GracecError(
                "the text has no place for its pictures, or one without a picture",
                where=sample.where,
                fix="use the model's own chat template",
            )
        spans = self._spans(sample, ids)
        if self._marks_answers:
            marks = torch.as_tensor(encoded["assistant_masks"][index])[:length].tolist()
            marked = _runs(marks)
            if len(marked) != len(spans):
                raise GracecError(
                    f"the chat template marks {len(marked)} answers of {len(spans)}",
                    where=sample.where,
                    fix="put {% generation %} around the answers",
                )
            # A mark covers tokens that it touches, the first of the next turn perhaps.
            ends = [end for _, end in spans]
            spans = [
                (start, min(end, last)) for (start, end), last in zip(marked, ends, strict=True)
            ]
        if any(start >= end for start, end in spans):
            self._report(sample, "the tokenizer knows no token for an answer")
            return None
        row = self._limited(self._closed(ids, spans), sample)
        if not row.spans:
            self._report(sample, f"max_length {self.max_length} leaves no token of an answer")
            return None
        return row

    def _spans(self, sample: Sample, ids: list[int]) -> list[tuple[int, int]]:
        """The turns of the assistant in `ids`: from the prompt for each to its end.

        If the template marks the answers itself, a start is that of the text.
        """
        text = self._text(sample.turns)
        places = text.count(self.processor.image_token)
        if places not in (0, len(sample.images)):
            raise GracecError(
                f"the chat template has {places} places for {len(sample.images)} images",
                where=sample.where,
            )
        plain = self._plain_tokens(text)
        # Usually expanding the placeholders is all that the processor has done to the text; then
        # prompts need not go through it, with their pictures, one by one.
        kept = [at for at, token in enumerate(ids) if token != self._image_id]
        words = [at for at, token in enumerate(plain) if token != self._image_id]
        if [ids[at] for at in kept] != [plain[at] for at in words]:
            return self._prefix_spans(sample, text, ids, pictures=True)
        place = dict(zip(words, kept, strict=True))
        found = self._prefix_spans(sample, text, plain, pictures=False)
        # An answer without tokens may begin where the text ends.
        return [(place.get(start, len(ids)), place[end - 1] + 1) for start, end in found]

    def _prefix_spans(
        self, sample: Sample, text: str, ids: list[int], *, pictures: bool
    ) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(sample.turns):
            if turn.role != "assistant":
                continue
            start = 0 if self._marks_answers else self._start(sample, number, text, ids, pictures)
            whole = self._text(sample.turns[: number + 1])
            if not text.startswith(whole):
                raise GracecError(
                    f"the chat template writes answer {len(spans) + 1} otherwise once more follows",
                    where=sample.where,
                    fix="use a chat template that writes each turn by itself",
                )
            # The last blank of a turn may be one token with what follows, hence the common part.
            end = _common(self._tokens(whole, sample, number + 1, pictures), ids)
            spans.append((start, end))
        return spans

    def _start(self, sample: Sample, number: int, text: str, ids: list[int], pictures: bool) -> int:
        """Tokens of the prompt for turn `number`, with which `ids` must begin."""
        prompt = self._text(sample.turns[:number], prompt=True)
        before = self._tokens(prompt, sample, number, pictures)
        if not text.startswith(prompt) or ids[: len(before)] != before:
            raise GracecError(
                f"the conversation does not begin with the prompt for its turn {number + 1}",
                where=sample.where,
                fix="use a chat template whose add_generation_prompt writes what it writes before "
                "an answer",
            )
        return len(before)

    def _tokens(self, text: str, sample: Sample, turns: int, pictures: bool) -> list[int]:
        images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns[:turns])
        if not pictures or not images:
            return self._plain_tokens(text)
        try:
            encoded = self.processor(
                images=[list(sample.images[:images])], text=[text], **self._special_tokens(text)
            )
        except _REFUSALS as error:
            raise self._refused(sample, error) from error
        return [int(token) for token in encoded["input_ids"][0]]

    def _plain_tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, **self._special_tokens(text))["input_ids"]
        return found

    def _closed(self, ids: list[int], spans: Sequence[tuple[int, int]]) -> _Row:
        """Every answer up to the first token that stops generation; the last one always has it."""
        closed = []
        for number, (start, end) in enumerate(spans):
            last = number == len(spans) - 1
            limit = len(ids) if last else spans[number + 1][0]
            stop = next((at for at in range(start, limit) if ids[at] in self._stops), None)
            if stop is not None and all(self._is_blank(token) for token in ids[end:stop]):
                closed.append((start, stop + 1))
                continue
            while end > start + 1 and self._is_blank(ids[end - 1]):
                end -= 1
            if last:
                ids = [*ids[:end], self._stops[0]]
                end += 1
            closed.append((start, end))
        return _Row(ids, closed)

    def _is_blank(self, token: int) -> bool:
        return not str(self._tokenizer.decode([token])).strip()

    def _limited(self, row: _Row, sample: Sample) -> _Row:
        length = self.max_length
        if length is None or len(row.ids) <= length:
            return row
        if self._image_id in row.ids[length:]:
            raise GracecError(
                f"max_length {length} cuts off a part of a picture",
                where=sample.where,
                fix="allow longer samples, or leave this one out",
            )
        spans = [(start, min(end, length)) for start, end in row.spans if start < length]
        return _Row(row.ids[:length], spans)

    def _batch(self, encoded: Mapping[str, Any], rows: Sequence[_Row]) -> Batch:
        """The processor's tensors with the rows as they are now, and the labels."""
        old: Tensor = encoded["input_ids"]
        shape = (len(rows), max(len(row.ids) for row in rows))
        batch: Batch = {}
        for name, value in encoded.items():
            if not isinstance(value, Tensor) or name == "assistant_masks":
                continue
            batch[name] = value
            if value.shape == old.shape:  # of tokens: input_ids, attention_mask, token types
                width = min(shape[1], old.shape[1])
                batch[name] = value.new_zeros(shape)
                batch[name][:, :width] = value[:, :width]
        batch["labels"] = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][index] = self._tokenizer.pad_token_id
            batch["input_ids"][index, :length] = torch.tensor(row.ids)
            batch["attention_mask"][index] = torch.arange(shape[1]) < length
            for start, end in row.spans:
                batch["labels"][index, start:end] = torch.tensor(row.ids[start:end])
        return batch


def _messages(turns: Sequence[Turn], images: Sequence[Image.Image] = ()) -> list[dict[str, Any]]:
    """Turns as a chat template takes them; without `images` the parts for images are empty."""
    rest = iter(images)
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            if number:
                parts.append(
                    {"type": "image", "image": next(rest)} if images else {"type": "image"}
                )
            if text.strip():
                parts.append({"type": "text", "text": text.strip()})
        messages.append({"role": turn.role, "content": parts})
    return messages


def _runs(marks: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open spans of the consecutive ones."""
    edges = [at for at in range(len(marks) + 1) if _mark(marks, at) != _mark(marks, at - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _mark(marks: Sequence[int], at: int) -> bool:
    return 0 <= at < len(marks) and bool(marks[at])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))


# --- Order ---------------------------------------------------------------------------------------


def epoch_order(length: int, epoch: int, seed: int) -> list[int]:
    """The numbers below `length` in an order that seed and epoch determine."""
    if length < 0 or epoch < 0:
        raise GracecError(f"length and epoch must be at least 0, not {length} and {epoch}")
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order
