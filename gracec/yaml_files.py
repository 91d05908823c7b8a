"""YAML that somebody else may have written: a mapping of plain data, or one line says why not.

A few lines of YAML can stand for gigabytes: aliases and merge keys repeat what they name, and each
repetition may hold the next. So the events of a document are counted, each alias as all that it
stands for, before anything is built from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gracec.errors import GracecError, first_line

LARGEST = 1 << 20
"""Bytes of a file."""
DEEPEST = 32
"""Lists and mappings within each other."""
MOST_NODES = 20_000
"""Values of a document, those that aliases repeat among them."""

# What PyYAML raises for values that are not what their tag says, beside its own errors.
_REFUSALS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, its keys texts.

    Raises:
        GracecError: if the file is missing, no regular file, not readable, too large, not UTF-8,
            not YAML, nested too deeply, stands for too many values, or holds something else.
    """
    where = str(path)
    try:
        if not path.is_file():
            kind = "no regular file" if path.exists() else "no such file"
            raise GracecError(kind, where=where)
        if path.stat().st_size > LARGEST:
            raise GracecError(f"larger than {LARGEST} bytes", where=where)
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GracecError("not readable as YAML: not UTF-8", where=where) from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GracecError(f"cannot be read: {reason}", where=where) from error
    try:
        _check_size(text, where)
        value = yaml.safe_load(text)
    except (*_REFUSALS, RecursionError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise GracecError(f"not readable as YAML: {detail}", where=where) from error
    if not isinstance(value, dict):
        raise GracecError("not a mapping of fields", where=where)
    odd = [str(key)[:40] for key in value if not isinstance(key, str)]
    if odd:
        raise GracecError(f"a key is {odd[0]!r}, which is no text", where=where)
    return value


def _check_size(text: str, where: str) -> None:
    """Walk over the events, which are read one by one and not recursively.

    Raises:
        GracecError: if there is too much, or it is too deep.
    """
    sizes: dict[str, int] = {}  # anchor -> values that its node stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values before it
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in open_nodes):
                raise GracecError(f"*{anchor} stands within itself", where=where)
            count += sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1
        if len(open_nodes) > DEEPEST:
            raise GracecError(
                f"lists and mappings more than {DEEPEST} deep within each other", where=where
            )
        if count > MOST_NODES:
            raise GracecError(f"stands for more than {MOST_NODES} values", where=where)
