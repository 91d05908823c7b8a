"""Training data: conversations about pictures, read lazily.

    data = open_train_data("llava.jsonl")            # every record is checked, no picture decoded
    train, held_out = data.split(0.1, seed=0)        # no picture on both sides
    sample = train.sample(3)

Data is not trusted. Pictures are read from below the image root only, in a few common formats, up
to a limit of pixels; nothing is unpickled and nothing is fetched. A record that cannot be used is a
`BrokenSample` with its reason: counted, reported, and left out, when the data is opened or, if only
decoding its picture shows it, of its batch. In strict mode, or when more than half of the records
are broken, it is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gracec.data.pictures import confined, open_image, pixel_digest, to_rgb
from gracec.data.records import (
    Broken,
    Conversation,
    Embedded,
    ImageRef,
    Turn,
    holds_text,
    read_record,
    short,
)
from gracec.data.sources import Source, open_source
from gracec.errors import GracecError, GracecWarning

MOST_KEYS = 10
"""Keys that a note names."""


@dataclass(frozen=True)
class Sample:
    """A conversation, its RGB pictures in the order of their placeholders, and the record it comes
    from, which errors name. It ends with an answer, unless it may end with a question."""

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    where: str = ""

    @property
    def name(self) -> str:
        """What to call it in an error."""
        return self.where or "a sample"


@dataclass(frozen=True)
class BrokenSample:
    """A record that cannot be trained on: where it is, what kind of fault, and the fault itself."""

    where: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def open_train_data(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    image_root: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> TrainData:
    """Open training data and check every record, without decoding a picture.

    Args:
        source: a `.json` or `.jsonl` file of conversations; a folder with one (`FOLDER_FILES`), a
            folder written by `datasets.Dataset.save_to_disk`, or one of parquet shards; a
            `datasets.Dataset`; or a sequence of records. `docs/training-data.md` shows them.
        image_root: folder that image paths are relative to and may not leave; by default that of
            the file or the folder itself. A sequence has none.
        strict: whether a broken record is an error.

    Raises:
        GracecError: if the source cannot be read or is empty, if more than half of its records are
            broken, or, in strict mode, if one is.
    """
    return read_conversations(open_source(source), image_root=image_root, strict=strict)


def read_conversations(
    opened: Source,
    *,
    image_root: str | os.PathLike[str] | None = None,
    strict: bool = False,
    answered: bool = True,
) -> TrainData:
    """What `open_train_data` makes of a source.

    Args:
        answered: whether each conversation has to end with an answer, or may end with a question,
            which there is nothing to learn from.
    """
    root = opened.folder if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise GracecError("the image root is not a folder", where=str(root))
    if len(opened) == 0:
        raise GracecError("no records", where=opened.name)
    if is_plain_text(opened):
        raise GracecError(
            "plain text has no answers to learn",
            where=opened.name,
            fix="give conversations, or a recipe that needs no answers: w4a16-ptq, w4a16-scales",
        )
    ledger = Ledger(opened.name, len(opened), strict)
    reader = _Reader(opened, None if root is None else root.resolve(), ledger, answered)
    return reader.scan()


def is_plain_text(opened: Source) -> bool:
    """Whether the records of a source, going by the first, are texts and no conversations."""
    try:
        first = opened.record(0) if len(opened) else {}
    except Broken:
        return False
    return isinstance(first, Mapping) and holds_text(first)


@dataclass(frozen=True)
class _Reader:
    """Reads and checks single records; `root` is resolved."""

    source: Source
    root: Path | None
    ledger: Ledger
    answered: bool

    def scan(self) -> TrainData:
        """Look at every record once: what is broken, the pictures of each, and the fingerprint."""
        digest = hashlib.sha256(b"gracec training data 2\n" + self.source.content)
        sizes: dict[str, int | Broken] = {}
        keys: list[tuple[int, ...]] = []
        unread: set[str] = set()
        for number in range(len(self.source)):
            own: list[int] = []
            try:
                said = self.read(number)
                unread |= said.unread
                for image in said.images:
                    identity = self._identity(image, sizes)
                    digest.update(identity)
                    own.append(int.from_bytes(hashlib.sha256(identity).digest()[:8], "big"))
            except Broken as broken:
                digest.update(b"broken\n")
                self.ledger.add(number, self._broken(number, broken), warn=False)
            keys.append(tuple(own))
        self.ledger.warn_summary()
        left_out = tuple(sorted(self.ledger.broken))
        usable = tuple(number for number in range(len(keys)) if number not in self.ledger.broken)
        notes = _unread(self.source.name, unread)
        return TrainData(self, usable, left_out, notes, tuple(keys), digest.hexdigest())

    def sample(self, number: int) -> Sample | BrokenSample:
        known = self.ledger.broken.get(number)
        if known is not None:
            return known
        try:
            said = self.read(number)
            decoded = tuple(self._decode(image) for image in said.images)
        except Broken as broken:
            found = self._broken(number, broken)
            self.ledger.add(number, found)
            return found
        return Sample(said.turns, decoded, self.source.where(number))

    def _broken(self, number: int, broken: Broken) -> BrokenSample:
        return BrokenSample(self.source.where(number), broken.kind, broken.reason)

    def read(self, number: int) -> Conversation:
        """What a record says.

        Raises:
            Broken: if it cannot be used.
        """
        return read_record(self.source.record(number), answered=self.answered)

    def _identity(self, image: ImageRef, sizes: dict[str, int | Broken]) -> bytes:
        """What tells one picture from another without decoding it: its name and size in bytes."""
        if isinstance(image, Image.Image):
            return b"pixels " + pixel_digest(image) + b"\n"
        if isinstance(image, Embedded):
            name = image.name or hashlib.sha256(image.head()).hexdigest()
            return json.dumps([name, image.size]).encode() + b"\n"
        if image not in sizes:
            try:
                sizes[image] = self._confined(image)[1]
            except Broken as broken:
                sizes[image] = broken
        size = sizes[image]
        if isinstance(size, Broken):
            raise size
        return json.dumps([image, size]).encode() + b"\n"

    def content(self, image: ImageRef) -> bytes:
        """A digest of a picture as it is stored, or of its pixels if it is in memory."""
        if isinstance(image, Image.Image):
            return pixel_digest(image)
        if isinstance(image, Embedded):
            return hashlib.sha256(image.bytes()).digest()
        return hashlib.sha256(self._confined(image)[0].read_bytes()).digest()

    def _confined(self, name: str) -> tuple[Path, int]:
        """The file of a picture below the image root, and its size in bytes."""
        if self.root is None:
            reason = "is a path, and there is no folder to look in: pass image_root"
            raise Broken("image path", f"image {short(name)} {reason}")
        return confined(self.root, name)

    def _decode(self, image: ImageRef) -> Image.Image:
        if isinstance(image, Image.Image):
            return to_rgb(image, "the image")
        if isinstance(image, Embedded):
            return open_image(io.BytesIO(image.bytes()), f"image {short(image.name)}")
        return open_image(self._confined(image)[0], f"image {short(image)}")


@dataclass(frozen=True)
class Ledger:
    """The broken records of a source, and what becomes of them."""

    name: str
    total: int
    strict: bool
    broken: dict[int, BrokenSample] = field(default_factory=dict)

    def add(self, number: int, sample: BrokenSample, *, warn: bool = True) -> None:
        first = all(sample.kind != other.kind for other in self.broken.values())
        self.broken[number] = sample
        if self.strict:
            raise GracecError(sample.reason, where=sample.where)
        if 2 * len(self.broken) > self.total:
            earliest = self.broken[min(self.broken)]
            raise GracecError(
                f"more than half of the {self.total} samples are broken (such as {earliest})",
                where=self.name,
                fix="mend the data",
            )
        if warn and first:
            warnings.warn(
                f"{sample} ({sample.kind}); samples like this are left out",
                GracecWarning,
                stacklevel=2,
            )

    def warn_summary(self) -> None:
        if not self.broken:
            return
        kinds: dict[str, list[BrokenSample]] = {}
        for sample in self.broken.values():
            kinds.setdefault(sample.kind, []).append(sample)
        listed = "; ".join(f"{len(group)} {kind} ({group[0]})" for kind, group in kinds.items())
        warnings.warn(
            f"{len(self.broken)} of {self.total} samples are broken and left out: {listed}",
            GracecWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class TrainData:
    """Samples by number, read when asked for.

    fingerprint: SHA-256, in hex, of the records and of the name and the size in bytes of every
        picture. Records are hashed as the bytes of their file, or as the fingerprint and the files
        that `datasets` keeps; pictures in memory by their pixels. It does not depend on where the
        data lies, and does not see a picture that was replaced by another of the same size.
    """

    _reader: _Reader
    _numbers: tuple[int, ...]
    _left_out: tuple[int, ...]
    _notes: tuple[str, ...]
    _keys: tuple[tuple[int, ...], ...]
    fingerprint: str

    def __len__(self) -> int:
        """The number of samples, without those that were found to be broken when opening."""
        return len(self._numbers)

    def sample(self, index: int) -> Sample | BrokenSample:
        """Sample `index`, 0 <= index < len, with its pictures decoded: RGB and upright.

        A `BrokenSample` if a picture cannot be decoded, or is no longer there.

        Raises:
            GracecError: if it is broken and the data strict; if more than half of all samples are
                now known to be broken; if the file has changed since it was opened.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._reader.sample(self._numbers[index])

    def record(self, index: int) -> int:
        """The number of the record that sample `index` is."""
        return self._numbers[index]

    def said(self, index: int) -> tuple[Turn, ...]:
        """The turns of sample `index`; no picture is looked at."""
        return self._reader.read(self._numbers[index]).turns

    def known_broken(self, indices: Sequence[int]) -> dict[int, BrokenSample]:
        """Of these samples those that are known to be broken."""
        broken = self._reader.ledger.broken
        found = {index: broken.get(self._numbers[index]) for index in indices}
        return {index: sample for index, sample in found.items() if sample is not None}

    def learn_broken(self, index: int, sample: BrokenSample) -> None:
        """Take in that sample `index` is broken, which another process found.

        Raises:
            GracecError: as `sample` does.
        """
        if self._numbers[index] not in self._reader.ledger.broken:
            self._reader.ledger.add(self._numbers[index], sample)

    @property
    def problems(self) -> list[str]:
        """A line for each record known to be broken: where, and why.

        After a split, those that were left out when opening are listed by the first part.
        """
        broken = self._reader.ledger.broken
        numbers = sorted((*self._left_out, *self._numbers))
        return [str(broken[number]) for number in numbers if number in broken]

    @property
    def notes(self) -> list[str]:
        """What else is to be known of the data; after a split of the first part."""
        return list(self._notes)

    def split(self, share: float, seed: int) -> tuple[TrainData, TrainData]:
        """(train, held out): about `share` of the samples are held out.

        Samples that have a picture in common, directly or through others, stay on one side. What is
        drawn depends on the seed and the pictures' names and sizes, not on the order of records (a
        sample without pictures is drawn by its position).

        Raises:
            GracecError: if `share` is not between 0 and 1, or if one side would be empty.
        """
        if not 0 < share < 1:
            raise GracecError(f"the share to hold out must be between 0 and 1, not {share}")
        target = min(max(1, round(share * len(self))), len(self) - 1)
        held = draw_apart([self._keys[number] for number in self._numbers], target, seed)
        if len(held) == len(self):
            raise GracecError(
                "cannot be split: the samples share their pictures, or there is one only",
                where=self._reader.ledger.name,
            )
        chosen = set(held)
        rest = [index for index in range(len(self)) if index not in chosen]
        return self._part(rest, self._left_out, self._notes), self._part(held, (), ())

    def pictures(self, index: int) -> tuple[int, ...]:
        """What tells the pictures of sample `index` from others: their names and sizes, hashed."""
        return self._keys[self._numbers[index]]

    def without(self, other: TrainData) -> TrainData:
        """The samples that have no picture in common with another data, and ask no text of it.

        A picture is in common if its file has the name and the content that it has there. One in
        memory is compared by its pixels, and never with a file.
        """
        known = {key for number in other._numbers for key in other._keys[number]}
        known &= {key for number in self._numbers for key in self._keys[number]}
        contents = {one for index in range(len(other)) for one in other._contents(index, known)}
        asked = {other._asked(index) for index in range(len(other)) if not other.pictures(index)}
        kept = [
            index
            for index in range(len(self))
            if (
                not contents.intersection(self._contents(index, known))
                if self.pictures(index)
                else not asked or self._asked(index) not in asked
            )
        ]
        return self if len(kept) == len(self) else self._part(kept, self._left_out, self._notes)

    def _contents(self, index: int, keys: set[int]) -> list[bytes]:
        """Digests of the pictures of a sample that have one of these keys."""
        if not keys.intersection(self.pictures(index)):
            return []
        try:
            images = self._reader.read(self._numbers[index]).images
            pairs = zip(images, self.pictures(index), strict=True)
            return [self._reader.content(image) for image, key in pairs if key in keys]
        except (Broken, OSError):  # it is no longer there, which shows when it is asked for
            return []

    def _asked(self, index: int) -> tuple[str, ...]:
        """What is said in a sample, but for the answers."""
        return tuple(turn.text for turn in self.said(index) if turn.role != "assistant")

    def _part(
        self, indices: Sequence[int], left_out: tuple[int, ...], notes: tuple[str, ...]
    ) -> TrainData:
        numbers = tuple(self._numbers[index] for index in indices)
        digest = hashlib.sha256(f"{self.fingerprint} {numbers}".encode()).hexdigest()
        return TrainData(self._reader, numbers, left_out, notes, self._keys, digest)


def _unread(name: str, keys: set[str]) -> tuple[str, ...]:
    """What is to be said about keys that nothing reads."""
    if not keys:
        return ()
    named = sorted(short(repr(key)) for key in keys)
    more = f" and {len(named) - MOST_KEYS} more" if len(named) > MOST_KEYS else ""
    return (f"{name}: nothing reads the keys {', '.join(named[:MOST_KEYS])}{more}",)


def draw_apart(keys: Sequence[tuple[int, ...]], count: int, seed: int) -> list[int]:
    """About `count` positions, sorted, that have no key in common with those that are not drawn.

    They are all positions, if these cannot be told apart so.
    """
    groups = _connected(keys)
    drawn = sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    held: list[int] = []
    for key in drawn:
        if len(held) + len(groups[key]) <= count:
            held += groups[key]
    if not held:  # every group is larger
        held = groups[min(drawn, key=lambda key: len(groups[key]))]
    return sorted(held)


def _connected(keys: Sequence[tuple[int, ...]]) -> dict[str, list[int]]:
    """Positions grouped so that those with a key in common are together (union-find).

    A group is named by its smallest key; a position without keys is a group of its own.
    """
    parent: dict[int, int] = {}

    def find(key: int) -> int:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for own in keys:
        for key in own[1:]:
            low, high = sorted((find(own[0]), find(key)))
            parent[high] = low
    groups: dict[str, list[int]] = {}
    for position, own in enumerate(keys):
        name = f"image {find(own[0])}" if own else f"sample {position}"
        groups.setdefault(name, []).append(position)
    return groups


def epoch_order(length: int, epoch: int, seed: int) -> list[int]:
    """The numbers below `length` in an order that seed and epoch determine."""
    if length < 0 or epoch < 0:
        raise GracecError(f"length and epoch must be at least 0, not {length} and {epoch}")
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order
