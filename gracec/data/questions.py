"""Question answering samples on disk: a folder with `samples.jsonl` and the images it names.

One line is one question:

    {"image": "images/000012.png", "question": "Where is it?", "answer": "left", "type": "where"}

`type` groups the questions in reports and may be left out, and so may `image`, for a question about
none. Images lie below the folder. Other keys are ignored, unless they name a picture of a question
that has none.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gracec.data.pictures import confined, load_image
from gracec.data.records import Broken, is_text, short
from gracec.errors import GracecError, first_line

SAMPLES_FILE = "samples.jsonl"
DEFAULT_TYPE = "all"
_MEDIA = ("image", "img", "picture", "photo", "video", "audio")


@dataclass(frozen=True)
class VqaSample:
    """A question about one image or none, its expected answer, and the group it is reported in."""

    image: Path | None
    question: str
    answer: str
    type: str = DEFAULT_TYPE

    def picture(self) -> Image.Image | None:
        """What it is about, as `load_image` reads it."""
        return None if self.image is None else load_image(self.image)


def load_samples(path: Path, limit: int | None = None) -> list[VqaSample]:
    """Read the samples of a folder, and decode every image once to see that it can be.

    Args:
        path: folder with `samples.jsonl`; image paths are relative to it and may not leave it.
        limit: take at most so many, balanced over the types and drawn at random within each;
            the same ones every time, in the order of the file.

    Raises:
        GracecError: naming the file and the line, if a line is no question or `load_image` refuses
            its image.
    """
    # Read here rather than by `datasets`: its JSON loader copies everything into a cache in the
    # user's home first, and an error does not say which line is wrong.
    file = Path(path) / SAMPLES_FILE
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise GracecError(
            f"cannot read the samples ({error.strerror})",
            where=str(file),
            fix=f"give a folder that holds {SAMPLES_FILE} and its images",
        ) from error
    numbered = [
        (number, _parse_line(line, file.parent, f"{file}:{number}"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not numbered:
        raise GracecError("no samples", where=str(file))
    if limit is not None:
        chosen = spread([sample.type for _, sample in numbered], limit)
        numbered = [numbered[index] for index in chosen]
    checked: set[Path] = set()
    for number, sample in numbered:
        if sample.image is not None and sample.image not in checked:
            load_image(sample.image, where=f"{file}:{number}")
            checked.add(sample.image)
    return [sample for _, sample in numbered]


def image_path(folder: Path, name: str, where: str = "") -> Path:
    """The image that a question names, below its folder.

    Raises:
        GracecError: if it is an address, leads out of the folder, or is no file.
    """
    try:
        found, _ = confined(folder.resolve(), name)
    except Broken as broken:
        raise GracecError(broken.reason, where=where) from broken
    return found if "://" in name else folder / name


def _parse_line(line: bytes, folder: Path, where: str) -> VqaSample:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise GracecError("not UTF-8", where=where) from error
    except json.JSONDecodeError as error:
        raise GracecError(
            f"not valid JSON ({error.msg}, column {error.colno})",
            where=where,
            fix="write one JSON object a line",
        ) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        raise GracecError(f"not readable as JSON ({first_line(error)})", where=where) from error
    if not isinstance(record, dict):
        raise GracecError(
            f"expected a JSON object, found {type(record).__name__}",
            where=where,
            fix="write one JSON object a line",
        )
    fields = {
        name: _text(record, name, where)
        for name in ("image", "question", "answer", "type")
        if name in ("question", "answer") or name in record
    }
    if "image" not in fields:
        _check_no_picture(record, where)
    return VqaSample(
        image=image_path(folder, fields["image"], where) if "image" in fields else None,
        question=fields["question"],
        answer=fields["answer"],
        type=fields.get("type", DEFAULT_TYPE),
    )


def _check_no_picture(record: dict[str, object], where: str) -> None:
    """Refuse a question whose picture, or video, has another name than the one that is read."""
    known = {"question", "answer", "type"}
    for name in (name for name in record if name not in known):
        near = difflib.get_close_matches(name.lower(), ["image"], cutoff=0.75)
        if near or any(medium in name.lower() for medium in _MEDIA):
            raise GracecError(f'"{short(name)}" is not read', where=where, fix='name it "image"')


def _text(record: dict[str, object], name: str, where: str) -> str:
    value = record.get(name)
    if name not in record:
        raise GracecError(f'"{name}" is missing', where=where)
    if not isinstance(value, str) or not value.strip():
        raise GracecError(f'"{name}" must be a text that is not empty', where=where)
    if not is_text(value):
        raise GracecError(f'"{name}" has half of a character (a surrogate)', where=where)
    return value


def spread(types: Sequence[str], limit: int) -> list[int]:
    """Positions of at most `limit` elements: equal shares of each type, drawn at random in it.

    Drawn with a fixed seed rather than evenly spaced: data sets are often balanced in a cycle,
    and a stride that fits the cycle would pick one kind of answer only.
    """
    if limit < 1:
        raise GracecError(f"limit must be at least 1, not {limit}")
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(types):
        groups.setdefault(name, []).append(index)
    chosen: list[int] = []
    draw = random.Random(0)
    # The smallest group first: what it cannot fill goes to the larger ones.
    by_size = sorted(groups.values(), key=len)
    for position, group in enumerate(by_size):
        share = (limit - len(chosen)) // (len(by_size) - position)
        count = min(share, len(group))
        chosen += draw.sample(group, count)
    return sorted(chosen)
