"""JSON that somebody else may have written: read, and held to a model; else one line says why not.

Python's parser recurses, refuses numbers of thousands of digits and takes half a surrogate pair;
libraries that are handed what it returns recurse again. All of that ends here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gracec.errors import GracecError

DEEPEST = 100
"""Lists and objects within each other: far below where Python, or a library, stops recursing."""
LARGEST = 1 << 30
"""Bytes of a file. The largest tokenizers have some tens of millions."""

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class JsonModel(BaseModel):
    """What a JSON file must hold: no other keys, no other types, and only finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_json(path: Path, *, fix: str = "") -> Any:
    """The value that a JSON file holds.

    Args:
        fix: what the user can do about a file that is refused.

    Raises:
        GracecError: if the file is missing, no regular file, not readable, too large, not UTF-8,
            not JSON or nested too deeply.
    """
    where = str(path)
    try:
        if not path.is_file():
            kind = "no regular file" if path.exists() else "no such file"
            raise GracecError(kind, where=where, fix=fix)
        if path.stat().st_size > LARGEST:
            raise GracecError("too large to be a JSON file of a model", where=where, fix=fix)
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise GracecError(f"cannot be read: {reason}", where=where, fix=fix) from error
    return parse_json(content, where=where, fix=fix)


def read_json_object(path: Path, *, fix: str = "") -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        GracecError: as `read_json`, or if the file holds another value.
    """
    value = read_json(path, fix=fix)
    if not isinstance(value, dict):
        raise GracecError(f"not a JSON object but {_kind(value)}", where=str(path), fix=fix)
    return value


def parse_json(content: str | bytes, *, where: str, fix: str = "") -> Any:
    """The value of a JSON text, of bytes in UTF-8 with or without a byte order mark.

    Raises:
        GracecError: if it is not UTF-8, not JSON or nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
    except UnicodeError as error:
        raise GracecError("not readable as UTF-8 text", where=where, fix=fix) from error
    except RecursionError as error:
        raise _too_deep(where, fix) from error
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise GracecError(f"not readable as JSON: {detail}", where=where, fix=fix) from error
    if _deeper_than(value, DEEPEST):
        raise _too_deep(where, fix)
    return value


def check_fields(model: type[AnyModel], value: Any, *, where: str, fix: str = "") -> AnyModel:
    """A parsed value as what it must be.

    Raises:
        GracecError: naming the first field that is missing, unknown, or of another type or value.
    """
    if not isinstance(value, dict):
        raise GracecError(f"not a JSON object but {_kind(value)}", where=where, fix=fix)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"] if part != "[key]")
        message = first["msg"].removeprefix("Value error, ")
        raise GracecError(
            " ".join(f"{field}: {message}".split()) if field else message, where=where, fix=fix
        ) from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _too_deep(where: str, fix: str) -> GracecError:
    return GracecError(
        f"lists and objects more than {DEEPEST} deep within each other", where=where, fix=fix
    )


def _deeper_than(value: Any, most: int) -> bool:
    """Whether lists and objects are within each other in more than `most` levels."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
    return bool(level)
