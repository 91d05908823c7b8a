"""Where records come from: JSON, saved datasets, parquet, text, memory; read when asked for."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gracec.data.hub import is_dataset_name, load_hub_dataset
from gracec.data.questions import SAMPLES_FILE
from gracec.data.records import FORMS, Broken, Conversation, Embedded, as_record, short
from gracec.errors import GracecError, first_line

LINES = (".jsonl", ".ndjson")
"""How the names of files with one record a line end; in a `.json` file they are seen."""
FOLDER_FILES = ("train.jsonl", "train.json", "data.jsonl", "data.json", SAMPLES_FILE)
"""What is looked for in a folder, in this order."""
KINDS = ".json, .jsonl, .ndjson, .parquet"
TEXT_FILES = (".txt", ".md")
"""How the names of files of plain text end."""
MOST_CHARACTERS = 1 << 24
"""Of plain text that is read: some four million tokens."""


@runtime_checkable
class Source(Protocol):
    """Records by number, parsed or conversations already. `name` and `where` are for messages,
    `folder` is the image root, `content` the digest of what is read."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def content(self) -> bytes: ...

    def __len__(self) -> int: ...

    def where(self, number: int) -> str: ...

    def record(self, number: int) -> Mapping[str, Any] | Conversation: ...


def open_source(source: Any) -> Source:
    """What `open_train_data` was given, as records by number.

    Raises:
        GracecError: if it cannot be read, or is no training data.
    """
    if isinstance(source, Source):
        return source
    if not isinstance(source, str | os.PathLike):
        return _in_memory(source)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in LINES or (path.suffix == ".json" and _has_lines(path)):
        return _JsonLines.open(path)
    if path.suffix == ".json":
        return _open_json(path)
    if path.suffix == ".parquet" and path.is_file():
        return _Arrow.parquet([path], path.parent)
    check_is_there(source)
    if not path.exists():
        return _Arrow.hub(str(source))
    if path.suffix in TEXT_FILES:
        return _TextFiles.of(path, [path])
    raise GracecError(
        "not training data",
        where=str(path),
        fix=f"give a {KINDS} or text file, or a folder",
    )


def check_is_there(source: Any, fix: str = "give training data") -> None:
    """Refuse the name of a file or folder that does not exist, before anything takes long.

    Raises:
        GracecError: if there is none, and no dataset can be meant either.
    """
    named = isinstance(source, str | os.PathLike)
    if named and not Path(source).exists() and not is_dataset_name(source):
        raise GracecError("does not exist", where=str(Path(source)), fix=fix)


def _open_folder(path: Path) -> Source:
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return open_source(path / name)
    if (path / "dataset_dict.json").is_file():
        return _Arrow.saved(_train_split(path), path)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _Arrow.saved(path, path)
    shards = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    # A folder with all splits names the shards after them.
    shards = [shard for shard in shards if shard.name.startswith("train")] or shards
    if shards:
        return _Arrow.parquet(shards, path)
    texts = sorted(file for file in path.iterdir() if file.suffix in TEXT_FILES and file.is_file())
    if texts:
        return _TextFiles.of(path, texts)
    raise GracecError(
        "no training data in this folder",
        where=str(path),
        fix=f"put one of {', '.join(FOLDER_FILES)}, a saved dataset, parquet or text files there",
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
            raise _unreadable(file, error) from error
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

    def record(self, number: int) -> Mapping[str, Any]:
        # Opened each time: a file that stays open shares its position with forked processes.
        try:
            with self.file.open("rb") as stream:
                if _stamp(stream.fileno()) != self.stamp:
                    raise GracecError("has changed since it was opened", where=str(self.file))
                stream.seek(self.offsets[number])
                line = stream.readline()
        except OSError as error:
            raise _unreadable(self.file, error) from error
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg}, column {error.colno})"
            raise Broken("not a record", reason) from error
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
            raise Broken("not a record", reason) from error
        return as_record(parsed)


@dataclass(frozen=True)
class _TextFiles:
    """Files of plain text, each a record with a "text"."""

    name: str
    folder: Path | None
    files: tuple[Path, ...]
    content: bytes

    @classmethod
    def of(cls, path: Path, files: Sequence[Path]) -> _TextFiles:
        content = hashlib.sha256()
        for file in files:
            try:
                with file.open("rb") as stream:
                    content.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise _unreadable(file, error) from error
        folder = path if path.is_dir() else path.parent
        return cls(str(path), folder, tuple(files), content.digest())

    def __len__(self) -> int:
        return len(self.files)

    def where(self, number: int) -> str:
        return str(self.files[number])

    def record(self, number: int) -> Mapping[str, Any]:
        file = self.files[number]
        try:
            with file.open(encoding="utf-8-sig") as stream:
                return {"text": stream.read(MOST_CHARACTERS + 1)}
        except UnicodeDecodeError as error:
            raise GracecError("not UTF-8", where=str(file), fix="save it so") from error
        except OSError as error:
            raise _unreadable(file, error) from error


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

    def record(self, number: int) -> Mapping[str, Any]:
        return as_record(self.records[number])


def _has_lines(file: Path) -> bool:
    """Whether a file holds one object a line, more than one: JSON lines, whatever its name."""
    try:
        with file.open("rb") as stream:
            if stream.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
                return False
            stream.seek(0)
            lines = (line for line in stream if line.strip())
            first, second = next(lines, b""), next(lines, b"")
        return bool(second) and isinstance(json.loads(first), dict)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError):
        return False


def _open_json(file: Path) -> _Records:
    try:
        content = file.read_bytes()
        parsed = json.loads(content)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise GracecError(f"not valid JSON ({first_line(error)})", where=str(file)) from error
    if isinstance(parsed, dict) and FORMS & parsed.keys():
        parsed = [parsed]  # a record alone
    if not isinstance(parsed, list):
        items = parsed.items() if isinstance(parsed, dict) else ()
        lists = [key for key, value in items if _is_records(value)]
        named = f"an object with a list under {short(repr(lists[0]))}" if len(lists) == 1 else ""
        raise GracecError(
            f"expected a JSON list of records, found {named or type(parsed).__name__}",
            where=str(file),
            fix="save that list alone" if named else "save a list, or one record a line as .jsonl",
        )
    return _Records(str(file), file.parent, parsed, hashlib.sha256(content).digest())


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _in_memory(source: Any) -> Source:
    if type(source).__module__.partition(".")[0] == "datasets":
        return _Arrow.given(source)
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise GracecError(
            f"training data cannot be a {type(source).__name__}",
            fix="give a path, a sequence of records, or a datasets.Dataset",
        )
    # Pictures are hashed by the scan.
    try:
        text = json.dumps(list(source), skipkeys=True, default=lambda value: type(value).__name__)
    except (ValueError, RecursionError) as error:
        raise GracecError(f"not records ({first_line(error)})", where="the records") from error
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
    def hub(cls, named: str) -> _Arrow:
        dataset = load_hub_dataset(named)
        return cls.of(named, None, dataset, [dataset._fingerprint])

    @classmethod
    def of(cls, name: str, folder: Path | None, dataset: Any, content: Sequence[Any]) -> _Arrow:
        text = json.dumps([len(dataset), str(dataset.features), *content])
        digest = hashlib.sha256(text.encode()).digest()
        return cls(name, folder, dataset.with_format("arrow"), digest)

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, number: int) -> str:
        return f"{self.name}: record {number}"

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
            return Embedded(path or "", data.as_buffer())
        return path
    value = scalar.as_py()
    return Embedded("", value) if isinstance(value, bytes) else value


class _refusing:
    """with _refusing(what, path): an error of `datasets` inside names the path in one line."""

    def __init__(self, what: str, path: Path) -> None:
        self.what, self.path = what, path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            cause = error.__cause__ or error
            raise GracecError(
                f"{self.what} cannot be read ({first_line(cause)})", where=str(self.path)
            ) from error


def _tail_digest(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return hashlib.sha256(stream.read()).hexdigest()


def _unreadable(file: Path, error: OSError) -> GracecError:
    return GracecError(f"cannot be read ({error.strerror})", where=str(file))


def _stamp(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
