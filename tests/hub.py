"""Caches of the Hugging Face Hub as huggingface_hub and datasets lay them out, and no network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants


def offline(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, str]:
    """Let this process read caches below a folder, and nothing else.

    Returns:
        Environment variables that do the same in another process.
    """
    hub, tables = root / "hub", root / "datasets"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tables)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    return {"HF_HUB_CACHE": str(hub), "HF_DATASETS_CACHE": str(tables), "HF_HUB_OFFLINE": "1"}


def cache_repository(root: Path, name: str, files: Path, *refs: str) -> str:
    """Put the files of a folder into the cache as a commit of a repository.

    Args:
        refs: branches and tags that are this commit.

    Returns:
        The commit.
    """
    repository = root / "hub" / f"models--{name.replace('/', '--')}"
    found = {file.relative_to(files): file.read_bytes() for file in _files(files)}
    commit = hashlib.sha1(repr(sorted(found.items())).encode()).hexdigest()
    for path, content in found.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        link = repository / "snapshots" / commit / path
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return commit


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def cache_dataset(root: Path, name: str, records: list[dict[str, Any]], split: str) -> None:
    """Put records into the cache of `datasets`, as it does with what it has read."""
    owner, short = name.split("/")
    folder = root / "datasets" / f"{owner}___{short}" / "default" / "0.0.0" / ("0" * 40)
    datasets.Dataset.from_list(records).save_to_disk(folder)
    (shard,) = folder.glob("*.arrow")
    shard.rename(folder / f"{short}-{split}.arrow")
    (folder / "state.json").unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    part = {"name": split, "num_bytes": 0, "num_examples": len(records), "dataset_name": short}
    info |= {"config_name": "default", "dataset_name": short, "splits": {split: part}}
    info |= {"builder_name": "parquet", "version": {"version_str": "0.0.0"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
