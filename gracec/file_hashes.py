"""The SHA-256 of every file that loading reads, and names that stay inside their directory.

A manifest says which files there are. Loading holds the directory to it: each one is there, is the
one that was written, and none of those that transformers looks for has come beside them. Other
files, a README.md or a user's notes, are nobody's business.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from gracec.errors import GracecError

PROCESSOR = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "audio_tokenizer_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*"),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "tekken.json",
        "tiktoken.model",
        "*.tiktoken",
    ),
    *("vocab.json", "vocab.txt", "vocab-*.json", "vocab.bpe", "merges.txt", "dict.txt"),
    *("spiece.model", "sentencepiece*.model", "spm*.model", "source.spm", "target.spm"),
    *("bpe.codes", "prophetnet.tokenizer", "byte_maps.json", "normalizer.json", "emoji.json"),
    *("entity_vocab.json", "target_vocab.json", "word_shape.json", "word_pronunciation.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*"),
)
"""Patterns of the names under which transformers looks for parts of a processor."""
CONFIGURATION = ("config.json", "generation_config.json", *PROCESSOR)
"""The same for all that it reads of a model but the weights."""
AGAIN = "copy it again or compile the model again"
EDITED = (
    "put back what was saved; to change it, change the processor or the configuration of the "
    "loaded model and save that"
)


def file_sha256(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal digits.

    Raises:
        GracecError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GracecError(f"cannot be read: {error.strerror}", where=str(path)) from error


def json_sha256(value: Any) -> str:
    """Of a JSON-able value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_read(name: str, patterns: Iterable[str] = CONFIGURATION) -> bool:
    """Whether transformers would read a file of this name, relative to the directory."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def read_names(directory: Path, patterns: Iterable[str] = CONFIGURATION) -> list[str]:
    """Names of the files of a directory that transformers would read, in order.

    Raises:
        GracecError: if the directory cannot be read.
    """
    found: set[str] = set()
    try:
        for pattern in patterns:
            found |= {path.relative_to(directory).as_posix() for path in directory.glob(pattern)}
        os.listdir(directory)
    except OSError as error:
        raise GracecError(f"cannot be read: {error.strerror}", where=str(directory)) from error
    return sorted(found)


def hashes_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> SHA-256 of files of a directory."""
    return {name: file_sha256(directory / name) for name in sorted(names)}


def check_files(directory: Path, hashes: Mapping[str, str], *, fix: str = "") -> None:
    """Hold files to their hashes.

    Args:
        hashes: name, with slashes -> SHA-256.

    Raises:
        GracecError: naming the first file that is missing, outside or not the one that was written.
    """
    for name, expected in sorted(hashes.items()):
        path = inside(directory, name)
        fix_it = fix or (EDITED if is_read(name) else AGAIN)
        if not os.path.isfile(path):
            raise GracecError("missing", where=str(path), fix=fix_it)
        if file_sha256(path) != expected:
            raise GracecError(
                "the file is not the one that was written (sha256 differs)",
                where=str(path),
                fix=fix_it,
            )


def check_configuration(directory: Path, hashes: Mapping[str, str]) -> None:
    """Hold all that transformers reads of a directory, but the weights, to what was written there.

    Raises:
        GracecError: naming the first file that is missing, is another one, or has been added.
    """
    for name in read_names(directory):
        if name not in hashes:
            raise GracecError(
                "the file was not written with the model, and would be read with it",
                where=str(directory / name),
                fix=f"remove it; {EDITED.partition('; ')[2]}",
            )
    check_files(directory, {name: sha for name, sha in hashes.items() if is_read(name)})


def inside(directory: Path, name: str) -> Path:
    """The path of a file by its name in a directory.

    A link may lead elsewhere in the directory, or into the store of a cache of the Hugging Face
    Hub, in which all files of a snapshot are such links.

    Raises:
        GracecError: if the name leads out of the directory.
    """
    parts = PurePosixPath(name).parts
    plain = name == PurePosixPath(name).as_posix() and not {"\\", "\0"} & set(name)
    if not plain or not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        raise GracecError(f"{name!r} is no name of a file in it", where=str(directory), fix=AGAIN)
    path = directory / name
    root, target = (Path(os.path.realpath(one)) for one in (directory, path))
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(one) for one in (root, *blobs)):
        raise GracecError(
            f"it leads out of its directory, to {target}", where=str(path), fix="copy the file here"
        )
    return path
