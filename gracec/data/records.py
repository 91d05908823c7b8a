"""What a record of training data says: the turns of a conversation, which of its answers are to be
learned, and where its pictures are."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from gracec.errors import printable

IMAGE_PLACEHOLDER = "<image>"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES["system"] = "system"

FORMS = {"conversations", "messages", "prompt", "question"}
"""Keys of which a record of a conversation has one."""

_MASKS = ("weight", "loss", "loss_mask", "train")
"""What data sets call the mark of a turn, or of a record, that is not to be learned."""

_UNTAUGHT = ("video", "videos", "audio", "audios", "tools")
"""What a record may hold that its text is about, and no model is taught here."""

_PICTURE_KEYS = ("image", "path", "url", "image_url", "base64")
"""Where a part of a message may name its picture."""

MOST_ENCODED = 1 << 26
"""Bytes of a picture that is written inside a record as text (64 MiB)."""

_TURN_KEYS = {"from", "role", "value", "content", *_MASKS}
_RECORD_KEYS = {"image", "images", "system", *_MASKS, *_UNTAUGHT}
_ABOUT = set(
    "id _id uid idx index name type source dataset split origin url license meta metadata info "
    "language lang category categories task topic tags width height image_id question_id "
    "conversation_id hash timestamp created_at".split()
)
"""What data sets say about a record, which nobody expects to be learned."""


@dataclass(frozen=True)
class Turn:
    """One message. `role` is user, assistant or system; pictures stand in `text` as `<image>`.
    Of an assistant's, `learned` says whether it is to be, and `complete` whether its end is."""

    role: str
    text: str
    learned: bool = True
    complete: bool = True


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


@dataclass(frozen=True)
class Conversation:
    """What a record says, checked.

    Attributes:
        turns: questions and answers in alternation, perhaps after a system's.
        images: where the picture of each placeholder is.
        unread: keys of the record and its turns that nothing here knows.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    unread: frozenset[str]


def holds_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is plain text: it has a "text", and no conversation."""
    said = any(record.get(key) is not None for key in FORMS)
    return isinstance(record.get("text"), str) and not said


def read_text(record: Mapping[str, Any]) -> str:
    """The text of a record of plain text; it may be empty.

    Raises:
        Broken: if there is none, or a picture beside it.
    """
    if not holds_text(record):
        raise Broken("no text", 'there is no "text", or a conversation beside it')
    for key in ("image", "images", *_UNTAUGHT):
        if _holds(record.get(key)):
            raise Broken(key, f'it has "{key}" beside "text": write it as a conversation about it')
    text: str = record["text"]
    if not is_text(text):
        raise Broken("no text", "it has half of a character (a surrogate)")
    return text


def read_record(record: Any, *, answered: bool = True) -> Conversation:
    """The conversation of a record; none of its pictures is looked at.

    Args:
        record: what was parsed, or a conversation already.
        answered: whether it has to end with an answer, or may end with a question.

    Raises:
        Broken: naming the first fault.
    """
    if isinstance(record, Conversation):
        return record
    record = as_record(record)
    for untaught in _UNTAUGHT:
        if _holds(record.get(untaught)):
            raise Broken(untaught, f'it has "{untaught}", which no model is taught here')
    images, own = _image_refs(record), list[ImageRef | None]()
    key, items = _messages(record)
    if key is None and record.get("prompt") is not None:
        keys, items = {"prompt", "completion"}, _completed(record)
    else:
        keys = {"question", "answer"} if key is None else {key}
    turns = tuple(_turn(item, own) for item in items)
    if not turns:
        turns = _question_and_answer(record, answered)
    if key != "conversations":
        turns = _about(turns, len(images))
    turns = _after_system(record, _masked(record, turns))
    check_turns(turns, answered=answered)
    refs = _agreed(images, own)
    check_images(turns, len(refs))
    unread = {str(name) for name, value in record.items() if value is not None}
    unread -= _RECORD_KEYS | keys
    for item in items:
        unread |= {str(name) for name, value in item.items() if value is not None} - _TURN_KEYS
    return Conversation(turns, tuple(refs), frozenset(unread - _ABOUT))


def _holds(value: Any) -> bool:
    return (
        value is not None
        and value is not False
        and not (hasattr(value, "__len__") and not len(value))
    )


def _same(some: Sequence[ImageRef], others: Sequence[ImageRef]) -> bool:
    """Whether they are the same pictures; one in memory is not decoded to see it."""
    return len(some) == len(others) and all(
        one is other or (not isinstance(one, Image.Image) and one == other)
        for one, other in zip(some, others, strict=True)
    )


def _image_refs(record: Mapping[str, Any]) -> list[ImageRef]:
    """Where the pictures are that a record lists, in order."""
    found = []
    for key in ("images", "image"):
        value = record.get(key)
        if value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            found.append([image_ref(item) for item in items])
    if len(found) == 2 and not _same(*found):
        raise Broken("two lists of images", '"image" and "images" name different pictures')
    return found[0] if found else []


def image_ref(value: Any) -> ImageRef:
    """Where one picture is.

    Raises:
        Broken: if it is neither a path nor a picture, or is an address, which nothing fetches.
    """
    if isinstance(value, Mapping):  # as `datasets` stores a picture, or clients of OpenAI
        data, path = value.get("bytes"), value.get("path")
        if data is None:
            value = value.get("url") if path is None else path
        elif isinstance(data, bytes | bytearray | memoryview):
            value = Embedded(path if isinstance(path, str) else "", bytes(data))
        else:
            raise Broken("image path", f"the bytes of an image are a {type(data).__name__}")
    elif isinstance(value, bytes | bytearray | memoryview):
        value = Embedded("", bytes(value))
    elif isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and value.startswith("data:"):
        return _from_data_uri(value)
    if isinstance(value, str) and is_address(value):
        raise Broken("image path", f"image {short(value)} is an address, nothing is fetched")
    if isinstance(value, str | Embedded | Image.Image) and value != "":
        return value
    raise Broken("image path", f"an image must be a path, not {short(repr(value))}")


def is_address(name: str) -> bool:
    """Whether a picture would have to be fetched."""
    return "://" in name and not name.startswith("file://")


def _from_data_uri(uri: str) -> Embedded:
    """The picture of "data:image/png;base64,..."; its type is what its bytes say."""
    head, comma, text = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Broken("image path", f"image {short(head, 40)} is no data URI in base64")
    return _from_base64(text)


def _from_base64(text: Any) -> Embedded:
    if not isinstance(text, str):
        raise Broken("image path", f"an image in base64 is a text, not a {type(text).__name__}")
    if len(text) > MOST_ENCODED // 3 * 4:
        raise Broken("image too large", f"an image in base64 has more than {MOST_ENCODED} bytes")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Broken("corrupt image", f"an image in base64 is none ({error})") from error
    if not data:
        raise Broken("corrupt image", "an image in base64 is empty")
    return Embedded("", data)


def _agreed(listed: list[ImageRef], own: Sequence[ImageRef | None]) -> Sequence[ImageRef]:
    """The pictures that the record lists, or those that its parts name themselves.

    Args:
        own: of each placeholder, in order; None where it is one without a name.
    """
    named = [ref for ref in own if ref is not None]
    if not named:
        return listed
    if not listed and len(named) == len(own):
        return named
    filled = [other if ref is None else ref for ref, other in zip(own, listed, strict=False)]
    if len(own) != len(listed) or not _same(filled, listed):
        raise Broken(
            "two lists of images", "the images in the messages are not those that the record lists"
        )
    return listed


def _messages(record: Mapping[str, Any]) -> tuple[str | None, list[Mapping[str, Any]]]:
    """The turns as they are written, and the key that they are under; None if there is none."""
    for key in ("conversations", "messages"):
        value = record.get(key)
        if isinstance(value, Mapping):
            value = _rows(value, key)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not value:
            raise Broken("no conversation", f'"{key}" must be a list that is not empty')
        for item in value:
            if not isinstance(item, Mapping):
                what = type(item).__name__
                raise Broken("no conversation", f"a turn must be an object, not {what}")
        return key, list(value)
    return None, []


def _rows(columns: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects, which `datasets` may store by column."""
    values = list(columns.values())
    lengths = {len(value) if isinstance(value, list | tuple) else -1 for value in values}
    if len(lengths) != 1 or -1 in lengths:
        raise Broken("no conversation", f'the columns of "{key}" are no lists of one length')
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _completed(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The turns of a prompt and its completion, each a text or messages, as TRL has them.

    Only the completion is learned, as TRL does by default.
    """
    found: list[Mapping[str, Any]] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(name)
        if isinstance(value, str):
            found.append({"role": role, "content": value})
        elif value is not None:
            _, items = _messages({"messages": value})
            context = name == "prompt"
            found += [
                {**item, "loss": 0} if context and _role(item) == "assistant" else item
                for item in items
            ]
    if record.get("completion") is None and _holds(record.get("chosen")):
        raise Broken("no conversation", 'it has "chosen" and no "completion" to learn')
    return found


def _about(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """The turns; where no text says where the images are, the first question begins with them."""
    first = next((at for at, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        return turns
    text = "\n".join([*[IMAGE_PLACEHOLDER] * images, turns[first].text])
    asked = replace(turns[first], text=text)
    return (*turns[:first], asked, *turns[first + 1 :])


def _question_and_answer(record: Mapping[str, Any], answered: bool) -> tuple[Turn, ...]:
    question, answer = record.get("question"), record.get("answer")
    if "question" not in record or (answered and "answer" not in record):
        forms = '"conversations", "messages", "prompt" or "question" with "answer"'
        raise Broken("no conversation", f"there are none of {forms}")
    unanswered = not answered and answer is None
    if not isinstance(question, str) or not (unanswered or isinstance(answer, str)):
        raise Broken("no conversation", '"question" and "answer" must be texts')
    asked = Turn("user", question.strip())
    return (asked,) if answer is None else (asked, Turn("assistant", answer.strip()))


def _turn(item: Mapping[str, Any], own: list[ImageRef | None]) -> Turn:
    """One turn; the pictures that its parts name are added to `own`."""
    role = _role(item)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise Broken("unknown role", f"unknown role {short(repr(role))} (known: {known})")
    text = item.get("value")
    if text is None:
        text = item.get("content")
    if isinstance(text, list | tuple):
        text = "\n".join(_part(part, own) for part in text)
    elif isinstance(text, str):
        own += [None] * text.count(IMAGE_PLACEHOLDER)
    if not isinstance(text, str):
        raise Broken("no conversation", f"the {role} turn has no text")
    return Turn(_ROLES[role], text.strip(), _mark(item, f"the {role} turn"))


def _role(item: Mapping[str, Any]) -> Any:
    return item.get("from") or item.get("role")


def _part(part: Any, own: list[ImageRef | None]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None and isinstance(part, Mapping):  # some leave the type out
        kind = "text" if isinstance(part.get("text"), str) else kind
        kind = "image" if any(part.get(key) is not None for key in _PICTURE_KEYS) else kind
    if kind in ("image", "image_url"):
        named = [key for key in _PICTURE_KEYS if part.get(key) is not None]
        read = _from_base64 if named[:1] == ["base64"] else image_ref
        own.append(read(part[named[0]]) if named else None)
        return IMAGE_PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        what = short(repr(kind))
        raise Broken("part", f"a part of a message must be a text or an image, not {what}")
    own += [None] * text.count(IMAGE_PLACEHOLDER)
    return text


def _mark(holder: Mapping[str, Any], what: str) -> bool:
    """Whether a turn is to be learned; what says nothing is."""
    marks = {
        name: _flag(holder[name], name, what) for name in _MASKS if holder.get(name) is not None
    }
    if len(set(marks.values())) > 1:
        raise Broken("mask", f"{what} is to be learned and not: {', '.join(marks)} disagree")
    return all(marks.values())


def _flag(value: Any, name: str, what: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise Broken("mask", f"{what} has {name} {short(repr(value))}, which can be 0 or 1 only")
    return bool(value)


def _masked(record: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns, with what the record says about all of them or each."""
    mask = record.get("loss_mask")
    answers = sum(turn.role == "assistant" for turn in turns)
    if isinstance(mask, list | tuple):
        if len(mask) not in (len(turns), answers):
            raise Broken("mask", f"loss_mask has {len(mask)} entries for {len(turns)} turns")
        flags = [_flag(value, "loss_mask", "a turn") for value in mask]
        every = len(mask) == len(turns)
        rest = iter(flags)
        turns = tuple(
            replace(turn, learned=next(rest) and turn.learned)
            if every or turn.role == "assistant"
            else turn
            for turn in turns
        )
        record = {**record, "loss_mask": None}
    if not _mark(record, "the record"):
        raise Broken("mask", "the record says that nothing of it is to be learned")
    asks = turns[-1].role != "assistant"  # where nothing is learned, or the answer is still to come
    if not asks and not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise Broken("mask", "no answer of it is to be learned")
    return turns


def _after_system(record: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns after what the record gives to the system, if its turns do not have it."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip():
        return turns
    first = Turn("system", system.strip())
    if turns[0].role != "system":
        return (first, *turns)
    if turns[0].text != first.text:
        raise Broken("two system turns", '"system" is not what the system says in the turns')
    return turns


def check_turns(turns: Sequence[Turn], *, answered: bool = True) -> None:
    """Refuse a conversation that is no alternation of questions and answers in text.

    Args:
        answered: whether the last one has to be an answer.

    Raises:
        Broken: naming the first fault.
    """
    spoken = turns[1:] if turns[0].role == "system" else turns
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    expected = expected if answered else expected[: len(spoken)]
    if not spoken or [turn.role for turn in spoken] != expected:
        raise Broken("order of turns", "the turns must be questions and answers in alternation")
    for turn in turns:
        if not turn.text:
            what = "an answer" if turn.role == "assistant" else f"a {turn.role} turn"
            raise Broken("empty text", f"{what} is empty")
        if not is_text(turn.text):
            raise Broken("no text", f"the {turn.role} turn has half of a character (a surrogate)")
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
            raise Broken("placeholders", f"{IMAGE_PLACEHOLDER} stands outside a user turn")


def check_images(turns: Sequence[Turn], images: int) -> None:
    """Refuse a conversation that is about more or fewer images.

    Raises:
        Broken: saying how many.
    """
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != images:
        raise Broken(
            "placeholders",
            f"{placeholders} {IMAGE_PLACEHOLDER} in the text for {images} images in the record",
        )


def is_text(text: str) -> bool:
    """Whether a text can be written: JSON can hold half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(text: str, length: int = 100) -> str:
    """A text for a message: on one line, cut off, and such that it can be written."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else f"{text[:length]}..."
