"""Datasets of the Hugging Face Hub by name: "org/name", or "org/name:split".

`datasets` fetches and caches, so that its settings hold. Tables and files are read; a dataset that
would run code of its own is refused by it.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import constants

from gracec.errors import GracecError, first_line
from gracec.models.hub import is_hub_name

SPLIT = "train"
"""What is read unless a name says otherwise."""


def is_dataset_name(named: object) -> bool:
    """Whether a text names a dataset of the Hub, and nothing on this machine."""
    return isinstance(named, str) and is_hub_name(named.partition(":")[0])


def load_hub_dataset(named: str) -> Any:
    """One split, as a `datasets.Dataset`.

    Args:
        named: "org/name:split"; without a split that for training.

    Raises:
        GracecError: in one line, if it cannot be had, or has no such split.
    """
    from datasets import config, load_dataset

    name, _, split = named.partition(":")
    try:
        return load_dataset(name, split=split or SPLIT)
    except Exception as error:
        offline = constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE
        cause = first_line(error)
        if offline and isinstance(error, ConnectionError):
            cause = "it is not in the cache of datasets, which is offline"
        raise GracecError(
            f"no such file or folder, and no dataset of the Hugging Face Hub: {cause}",
            where=named,
            fix="give training data, or the name of a dataset; where there is a network, "
            f"datasets.load_dataset({name!r}) fetches it",
        ) from error
