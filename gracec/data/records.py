"""What a record of training data says: the turns of a conversation, and where its pictures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES["system"] = "system"


@dataclass(frozen=True)
class Turn:
    """One message. `role` is user, assistant or system; pictures stand in `text` as `<image>`."""

    role: str
    text: str


class Broken(Exception):
    """Raised while a record is read; becomes a `BrokenSample`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Embedded:
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


ImageRef = str | Embedded | Image.Image


def as_record(parsed: Any) -> Mapping[str, Any]:
    """What was parsed, if it is a mapping.

    Raises:
        Broken: if it is something else.
    """
    if not isinstance(parsed, Mapping):
        raise Broken("not a record", f"expected an object, found {type(parsed).__name__}")
    return parsed


def image_refs(record: Mapping[str, Any]) -> list[ImageRef]:
    """Where each picture of a record is, in order; none of them is looked at.

    Raises:
        Broken: if one is neither a path nor a picture.
    """
    value = record.get("images")
    if value is None:
        value = record.get("image")
    if value is None:
        return []
    return [_image_ref(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _image_ref(value: Any) -> ImageRef:
    if isinstance(value, Mapping):  # as `datasets` stores a picture
        data = value.get("bytes")
        value = value.get("path") if data is None else Embedded(str(value.get("path") or ""), data)
    elif isinstance(value, bytes):
        value = Embedded("", value)
    elif isinstance(value, Path):
        value = str(value)
    if isinstance(value, str | Embedded | Image.Image) and value != "":
        return value
    raise Broken("image path", f"an image must be a path, not {short(repr(value))}")


def turns_of(record: Mapping[str, Any], images: int) -> tuple[Turn, ...]:
    """The conversation of a record; a question without placeholders gets one for each image.

    Raises:
        Broken: if there is none, or a turn is no text of a known role.
    """
    for key in ("conversations", "messages"):
        value = record.get(key)
        if isinstance(value, Mapping):  # a list of objects as `datasets` may store it: by column
            columns = list(value.values())
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        if value is not None:
            if not isinstance(value, list | tuple) or not value:
                raise Broken("no conversation", f'"{key}" must be a list that is not empty')
            return tuple(_turn(item) for item in value)
    if "question" in record and "answer" in record:
        question, answer = record["question"], record["answer"]
        if not isinstance(question, str) or not isinstance(answer, str):
            raise Broken("no conversation", '"question" and "answer" must be texts')
        if IMAGE_PLACEHOLDER not in question:
            question = "\n".join([*[IMAGE_PLACEHOLDER] * images, question])
        return (Turn("user", question.strip()), Turn("assistant", answer.strip()))
    raise Broken("no conversation", 'there are neither "conversations" nor "messages"')


def _turn(item: Any) -> Turn:
    if not isinstance(item, Mapping):
        raise Broken("no conversation", f"a turn must be an object, not {type(item).__name__}")
    role = item.get("from") or item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise Broken("unknown role", f"unknown role {short(repr(role))} (known: {known})")
    text = item.get("value")
    if text is None:
        text = item.get("content")
    if isinstance(text, list | tuple):
        text = "\n".join(_part(part) for part in text)
    if not isinstance(text, str):
        raise Broken("no conversation", f"the {role} turn has no text")
    return Turn(_ROLES[role], text.strip())


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE_PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise Broken("no conversation", "a part of a message must be a text or an image")
    return text


def check_turns(turns: Sequence[Turn], images: int) -> None:
    """Refuse a conversation that is no alternation of questions and answers about its images.

    Raises:
        Broken: naming the first fault.
    """
    spoken = turns[1:] if turns[0].role == "system" else turns
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or [turn.role for turn in spoken] != expected:
        raise Broken("order of turns", "the turns must be questions and answers in alternation")
    for turn in turns:
        if not turn.text:
            what = "an answer" if turn.role == "assistant" else f"a {turn.role} turn"
            raise Broken("empty text", f"{what} is empty")
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
            raise Broken("placeholders", f"{IMAGE_PLACEHOLDER} stands outside a user turn")
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != images:
        raise Broken(
            "placeholders",
            f"{placeholders} {IMAGE_PLACEHOLDER} in the text for {images} images in the record",
        )


def short(text: str, length: int = 100) -> str:
    """A text for a message: on one line, and cut off."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
