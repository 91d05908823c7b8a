"""Models and artifacts by name: a directory here, or a repository of the Hugging Face Hub.

    find_model("models/llava")            a directory that exists is always meant
    find_model("org/name", "v1.0")        otherwise the repository, at a branch, tag or commit

huggingface_hub fetches and caches, so that its settings hold: HF_HOME, HF_HUB_OFFLINE, tokens.
Fetched is what gracec reads: configurations, the processor and safetensors; no pickle and no code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gracec.directories import MANIFEST, is_artifact
from gracec.errors import GracecError, first_line
from gracec.file_hashes import CONFIGURATION

DESCRIPTION = (*CONFIGURATION, MANIFEST, "adapter_config.json")
"""Patterns of the files that say what a repository holds: kilobytes, and the tokenizer."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
CODES = ("gracec/*",)
ONNX = ("onnx/*",)
ONNX_SESSION = "onnx/session.json"
NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py")
BELOW = ("*/*.safetensors", "*/*.safetensors.index.json")
"""Patterns of weights in folders, which are not those of the model: `*` is also any folder."""
LOG_IN = "hf auth login"


@dataclass(frozen=True)
class Place:
    """Where a model or an artifact lies on this machine, and what it is called.

    Attributes:
        path: its directory, which need not exist.
        name: "org/name" of a repository, or the last part of the path.
        revision: the commit of the repository; empty for a directory.
    """

    path: Path
    name: str
    revision: str = ""

    def __str__(self) -> str:
        """What a user named."""
        return self.name if self.revision else str(self.path)

    def note(self, role: str) -> list[str]:
        """What a report says of it."""
        return [f"{role} {self.name} at revision {self.revision}"] if self.revision else []


Named: TypeAlias = str | os.PathLike[str] | Place


def is_hub_name(named: object) -> bool:
    """Whether a text is the name of a repository, "org/name", and of nothing on this machine."""
    if not isinstance(named, str) or named.count("/") != 1:
        return False
    try:
        validate_repo_id(named)
    except HFValidationError:
        return False
    return not os.path.lexists(named)


def name_of(named: str | os.PathLike[str]) -> str:
    """What a model is called: "org/name" of a repository, else the last part of its path."""
    return os.fspath(named) if is_hub_name(named) else Path(named).resolve().name


def find_model(named: Named, revision: str | None = None) -> Place:
    """A Hugging Face model or a gracec artifact, with its weights or codes.

    Args:
        named: a directory, or "org/name" of a repository. A `Path` is always a directory.
        revision: a branch, tag or commit of the repository; by default its main branch.

    Returns:
        Where it is. A directory is not looked into, nor has it to exist.

    Raises:
        GracecError: if the repository cannot be had, or a revision of a directory is asked for.
    """
    place = find_description(named, revision)
    if not place.revision or isinstance(named, Place):
        return place
    if is_artifact(place.path):
        return _with(place, CODES)
    found = _with(place, WEIGHTS, BELOW)
    if not any(found.path.glob("*.safetensors")) and (found.path / "config.json").is_file():
        raise GracecError(
            "no safetensors weights in the cache of the Hub"
            if constants.HF_HUB_OFFLINE
            else "the repository has no safetensors weights, and pickles are not read",
            where=place.name,
            fix=_download(place.name) if constants.HF_HUB_OFFLINE else "use one that has",
        )
    return found


def find_artifact(named: Named, revision: str | None = None, *, onnx: bool = False) -> Place:
    """What `gracec.load` reads: codes, or ONNX graphs. For the rest see `find_model`."""
    place = find_description(named, revision)
    if not place.revision:
        return place
    if onnx:
        return _with(place, ONNX)
    if not is_artifact(place.path):
        raise GracecError(f"not a gracec artifact; {MANIFEST} missing", where=place.name)
    return _with(place, CODES)


def has_graphs(named: Named, revision: str | None = None) -> bool:
    """Whether `gracec.load` finds ONNX graphs of gracec, whole or not; of a repository no graph is
    fetched. See `find_model`."""
    place = find_description(named, revision)
    path = place.path
    if place.revision and not constants.HF_HUB_OFFLINE:
        path = _fetched(place.name, place.revision, (*DESCRIPTION, ONNX_SESSION))
    elif not place.revision and is_artifact(path):
        return os.path.isdir(path / "onnx")
    return os.path.isfile(path / ONNX_SESSION)


def find_description(named: Named, revision: str | None = None) -> Place:
    """A model or an artifact without its weights: for looking at it. See `find_model`."""
    if isinstance(named, Place):
        return named
    if is_hub_name(named):
        name = os.fspath(named)
        place = Place(_fetched(name, revision, DESCRIPTION), name)
        return Place(place.path, name, place.path.name)
    path = Path(named)
    if revision is not None:
        raise GracecError(
            "a directory has no revisions",
            where=str(named),
            fix='leave revision out, or name a repository of the Hugging Face Hub, "org/name"',
        )
    return Place(path, name_of(path))


def _with(place: Place, patterns: Sequence[str], without: Sequence[str] = ()) -> Place:
    """The same with further files, of the same commit."""
    path = _fetched(place.name, place.revision, (*DESCRIPTION, *patterns), without)
    return Place(path, place.name, place.revision)


def _fetched(
    name: str, revision: str | None, patterns: Sequence[str], without: Sequence[str] = ()
) -> Path:
    """The snapshot of a repository in the cache, with the files of these patterns.

    Raises:
        GracecError: in one line, if it cannot be had.
    """
    neither = "no such model directory, and"
    at = "" if revision is None else f" at revision {revision}"
    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=[*NEVER, *without],
            local_files_only=constants.HF_HUB_OFFLINE,  # older ones ask all the same
        )
    except GatedRepoError as error:
        raise GracecError(
            "access to this repository of the Hugging Face Hub has to be asked for",
            where=name,
            fix=f"open {constants.ENDPOINT}/{name}, accept its terms, and log in: {LOG_IN}",
        ) from error
    except RevisionNotFoundError as error:
        raise GracecError(
            f"the repository has no revision {revision}", where=name, fix="check its branches"
        ) from error
    except RepositoryNotFoundError as error:
        raise GracecError(
            f"{neither} no such repository on the Hugging Face Hub, or a private one",
            where=name,
            fix=f"check the name; for a private one log in: {LOG_IN}",
        ) from error
    except IncompleteSnapshotError as error:
        raise GracecError(
            f"only a part of it{at} is in the cache of the Hugging Face Hub",
            where=name,
            fix=_download(name, revision),
        ) from error
    except LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        why = "which is offline" if offline else "which cannot be reached"
        raise GracecError(
            f"{neither} not{at} in the cache of the Hugging Face Hub, {why}",
            where=name,
            fix=_download(name, revision),
        ) from error
    except Exception as error:  # of HTTP, the disk, a proxy
        raise GracecError(
            f"it cannot be fetched from the Hugging Face Hub: {first_line(error)}",
            where=name,
            fix=_download(name, revision),
        ) from error
    return Path(path)


def _download(name: str, revision: str | None = None) -> str:
    at = "" if revision is None else f" --revision {revision}"
    return f"give a directory, or where there is a network: hf download {name}{at}"
