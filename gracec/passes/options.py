"""The options of a pass as text: `candidates=8 strict=true blocks=0;3 title="a b" limit=none`.

An option has a text form if it is a bool, int, float or str, None beside one of them, or a tuple of
them of any length. A string is quoted, as JSON does it, where it would otherwise be read as
something else. What is written is read back as the same value, or it is written as `<...>`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from gracec.errors import GracecError
from gracec.registry import lookup

OPAQUE = "<...>"
"""Stands for the value of an option that has no text form."""
QUOTED = r'"(?:[^"\\]|\\.)*"'
"""A quoted string, as a regular expression."""
_ORDER = (NoneType, bool, int, float, tuple, str)
_OPTION = re.compile(rf'(?:{QUOTED}|[^\s"])+', re.DOTALL)
_ELEMENT = re.compile(rf'(?:{QUOTED}|[^;"])*', re.DOTALL)
_BARE = re.compile(r'[^\s,;{}"<>]+')


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a pass.

    Attributes:
        kind: its type, as declared.
        default: `dataclasses.MISSING` if it has none.
    """

    name: str
    kind: Any
    default: Any

    @property
    def has_text_form(self) -> bool:
        """Whether a value of it can be given as text."""
        return any(_is_text(kind) for kind in _choices(self.kind) if kind is not NoneType)

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    def write_default(self) -> str:
        """The text of the default, or the kind in angle brackets if there is none."""
        return f"<{kind_name(self.kind)}>" if self.is_required else self.write(self.default)

    def write(self, value: Any) -> str:
        """The text that is read as this value, or `<...>`."""
        for quote in (False, True):
            text = _text(value, quote)
            if text is not None:
                try:
                    if _equal(_read(text, self.kind), value):
                        return text
                except ValueError:
                    pass
        return OPAQUE

    def read(self, text: str | None, where: str) -> Any:
        """The value that a text says; None is an option without `=`, which switches a bool on.

        Raises:
            GracecError: if it says none of this kind.
        """
        if not self.has_text_form or text == OPAQUE:
            raise GracecError(
                f"option {self.name!r} of {where} cannot be given as text", fix="use Python"
            )
        if text is None and bool in _choices(self.kind):
            return True
        if text is None:
            raise GracecError(f"option {self.name!r} of {where} needs a value")
        try:
            return _read(text, self.kind)
        except ValueError:
            raise GracecError(
                f"{text!r} is no {kind_name(self.kind)}", where=f"{where}.{self.name}"
            ) from None


def options_of(cls: type[Any]) -> dict[str, Option]:
    """Name -> option of every field of a dataclass that can be given to it."""
    try:
        kinds = get_type_hints(cls)
    except NameError:  # a type that is imported for a type checker only
        kinds = {}
    return {
        field.name: Option(field.name, kinds.get(field.name, field.type), _default(field))
        for field in dataclasses.fields(cls)
        if field.init
    }


def write_options(item: Any) -> str:
    """The options of a pass that differ from their defaults, `name=value` with blanks between."""
    return " ".join(
        f"{option.name}={option.write(getattr(item, option.name))}" for option in _given(item)
    )


def read_options(text: str, cls: type[Any], name: str) -> dict[str, Any]:
    """Name -> value of the options of a pass.

    Args:
        name: of the pass, for messages.

    Raises:
        GracecError: for an unknown option, with the nearest known name; a value that does not fit;
            one that is given twice, or is missing and has no default.
    """
    known = options_of(cls)
    values: dict[str, Any] = {}
    for written in _OPTION.findall(text):
        key, equals, value = written.partition("=")
        key = key.replace("-", "_")
        option: Option = lookup(key, known, f"option of {name}")
        if key in values:
            raise GracecError(f"option {key!r} of {name} is given twice")
        values[key] = option.read(value if equals else None, name)
    for option in known.values():
        if option.is_required and option.name not in values:
            raise GracecError(f"option {option.name!r} of {name} is missing and has no default")
    return values


def has_text_form(item: Any) -> bool:
    """Whether a pass with these options can be read back from what `str` prints."""
    return all(option.write(getattr(item, option.name)) != OPAQUE for option in _given(item))


def kind_name(kind: Any) -> str:
    """A type as it is written in code: `int | None`."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _given(item: Any) -> Iterator[Option]:
    for option in options_of(type(item)).values():
        if not _equal(getattr(item, option.name), option.default):
            yield option


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _equal(value: Any, other: Any) -> bool:
    try:
        return value is other or bool(value == other)
    except Exception:  # tensors compare by element
        return False


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is tuple:
        element, *rest = get_args(kind)
        return rest == [...] and all(choice in _ORDER for choice in _choices(element))
    return kind in _ORDER and kind is not tuple


def _text(value: Any, quote: bool) -> str | None:
    """What may be the text of a value; reading it back decides."""
    if isinstance(value, tuple):
        elements = [None if isinstance(v, tuple) else _text(v, quote) for v in value]
        return None if None in elements else ";".join(e for e in elements if e is not None)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if quote:
            return json.dumps(str(value), ensure_ascii=not value.isprintable())
        return value if _BARE.fullmatch(value) and value.isprintable() else None
    return repr(value) if type(value) in (int, float) else None


def _read(text: str, kind: Any) -> Any:
    choices = [choice for choice in _choices(kind) if _is_text(choice)]
    for choice in sorted(choices, key=_rank):
        try:
            return _read_as(text, choice)
        except ValueError:
            continue
    raise ValueError(text)


def _rank(kind: Any) -> int:
    """When a kind is tried: a string last, since every text is one."""
    return _ORDER.index(kind if kind in _ORDER else tuple)


def _read_as(text: str, kind: Any) -> Any:
    if kind is NoneType or kind is bool:
        words = {"none": None} if kind is NoneType else {"true": True, "false": False}
        if text not in words:
            raise ValueError(text)
        return words[text]
    if kind is str:
        if re.fullmatch(QUOTED, text, re.DOTALL):
            return json.loads(text)
        if '"' in text:
            raise ValueError(text)
        return text
    if get_origin(kind) is tuple:
        return tuple(_read(element, get_args(kind)[0]) for element in _elements(text))
    return kind(text)


def _elements(text: str) -> Iterator[str]:
    """What stands between semicolons that are in no quotes; nothing in an empty text."""
    place = 0
    while text:
        found = _ELEMENT.match(text, place)
        assert found is not None  # it matches nothing as well
        yield found.group()
        place = found.end() + 1
        if found.end() == len(text):
            return
        if text[found.end()] != ";":
            raise ValueError(text)
