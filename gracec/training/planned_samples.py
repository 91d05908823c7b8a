"""The samples that a plan is made for: some of the data, or stated pictures and text.

Both go through the processor of the model, which alone knows how many tokens a picture becomes.
Where a directory has none, the image processor of the family with its defaults stands in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import image_processing_auto

from gracec.capture import family_of
from gracec.data.collate import EmptyBatch
from gracec.data.prompts import Prompts, refusals
from gracec.errors import GracecError, first_line
from gracec.models.loading import load_processor
from gracec.objective.labels import IGNORE_INDEX
from gracec.training.micro_batch import Batch, MicroBatch
from gracec.training.samples import Samples

LOOKED_AT = 16
"""Samples of the data, spread over all of it, that go through the processor."""
MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class Stated:
    """A sample as it is stated.

    Attributes:
        images: pictures of a sample.
        picture: their width and height in pixels.
        text: tokens of text beside the pictures and what the chat template writes.
        answer: of these, the last ones, which are learned.
    """

    images: int = 1
    picture: tuple[int, int] = (640, 480)
    text: int = 128
    answer: int = 64

    def __post_init__(self) -> None:
        width, height = self.picture
        if self.images < 0 or width < 1 or height < 1 or width * height > MOST_PIXELS:
            raise GracecError(f"no picture is {width} x {height} pixels", where="picture")
        if not 0 < self.answer <= self.text:
            raise GracecError(
                f"{self.answer} tokens of an answer in {self.text} tokens of text",
                where="answer",
                fix="give at least as much text",
            )

    @classmethod
    def of(cls, images: int, picture: str, text: int, answer: int) -> Stated:
        """With the size of a picture as it is written: "640x480".

        Raises:
            GracecError: if it is no size.
        """
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", picture.strip())
        if found is None:
            raise GracecError(f"{picture!r} is no size", where="picture", fix="write 640x480")
        return cls(images, (int(found[1]), int(found[2])), text, min(answer, text))


@dataclass(frozen=True)
class PlannedSamples:
    """What was looked at.

    Attributes:
        lengths: tokens of each sample.
        longest: a batch of so many times the longest sample.
        typical: the sample whose length is nearest to the mean, as a batch.
        looked_at: each of them, as a batch; of alike ones one.
        source: where they are from, for people.
        count: samples that there are to train on; None where that is not known.
        held_out: samples that choose the best state, likewise.
    """

    lengths: tuple[int, ...]
    longest: Callable[[int], Batch]
    typical: Batch
    looked_at: tuple[Batch, ...]
    source: str
    count: int | None = None
    held_out: int | None = None

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def one_length(self) -> bool:
        """Whether the typical sample is as long as the longest."""
        return len(set(self.lengths)) == 1

    def padded(self, samples: int) -> float:
        """How much longer than a sample a batch of so many is, on average: it has the length of
        its longest."""
        ordered, count = sorted(self.lengths), len(self.lengths)
        shares = (((i + 1) / count) ** samples - (i / count) ** samples for i in range(count))
        return sum(x * share for x, share in zip(ordered, shares, strict=True)) / self.mean


def samples_of_data(samples: Samples, held_out: int) -> PlannedSamples:
    """Some samples of the data, spread over it.

    Args:
        held_out: how many others choose the best state.

    Raises:
        GracecError: if none of them can be used.
    """
    count = len(samples)
    numbers = sorted({count * i // LOOKED_AT for i in range(min(count, LOOKED_AT))})
    found: dict[int, Batch] = {}
    for number in numbers:
        try:
            found[number] = samples.batch([number])
        except EmptyBatch:  # broken, which the data reports
            continue
    if not found:
        raise GracecError(f"none of the {len(numbers)} samples looked at can be used", where="data")
    lengths = {number: batch["input_ids"].shape[1] for number, batch in found.items()}
    mean = sum(lengths.values()) / len(lengths)
    longest = max(lengths, key=lambda number: lengths[number])
    typical = min(lengths, key=lambda number: abs(lengths[number] - mean))
    return PlannedSamples(
        tuple(lengths.values()),
        lambda count: samples.batch([longest] * count),
        found[typical],
        tuple(found.values()),
        f"{len(found)} of {count:,} samples of the data",
        count,
        held_out,
    )


def stated_samples(model: PreTrainedModel, directory: Path, stated: Stated) -> PlannedSamples:
    """Pictures and text as they are stated.

    Args:
        directory: of the model, with its processor, if it has one.

    Raises:
        GracecError: if the processor refuses the pictures.
    """
    one, source = stated_batch(model, directory, stated, 1)
    return PlannedSamples(
        (one["input_ids"].shape[1],),
        lambda count: stated_batch(model, directory, stated, count)[0],
        one,
        (one,),
        source,
    )


def stated_batch(
    model: PreTrainedModel, directory: Path, stated: Stated, rows: int
) -> tuple[Batch, str]:
    """So many samples as they are stated, with labels; and what made pictures into tokens."""
    pictures = [Image.new("RGB", stated.picture)] * stated.images
    width, height = stated.picture
    what = f"{stated.images} picture{'s' * (stated.images != 1)} of {width} x {height} pixels"
    try:
        processor = load_processor(directory)
    except GracecError:
        processor = None
    if processor is not None:
        batch = _with_text(_prompts(processor, pictures, rows), stated, model)
        source = f"{what}, by the processor"
    else:
        batch, source = _without_processor(model, directory, stated, pictures, rows)
        source = f"{what}, {source}"
    labels = batch["input_ids"].clone()
    labels[:, : -stated.answer] = IGNORE_INDEX
    return {**batch, "labels": labels}, source


def sizes(model: PreTrainedModel, batch: Batch, *, everywhere: bool) -> tuple[int, int]:
    """Visual and supervised tokens of a batch."""
    micro = MicroBatch.read(model, batch, images=True, everywhere=everywhere)
    return sum(micro.image_sizes or ()), len(micro.labels)


def _prompts(processor: Any, pictures: Sequence[Image.Image], rows: int) -> Batch:
    """Turns of the user with pictures alone."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    if not parts:
        parts = [{"type": "text", "text": "?"}]
    turn = [{"role": "user", "content": parts}]
    made = Prompts(processor).encode([turn] * rows, ["picture"] * rows, padding_side="right")
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _with_text(batch: Batch, stated: Stated, model: PreTrainedModel) -> Batch:
    """The batch with tokens of text behind."""
    shape = batch["input_ids"].shape
    word = next(i for i in range(3) if i not in (model.config.image_token_id, 0))
    fill = {"input_ids": word, "attention_mask": 1}
    longer = {
        name: torch.nn.functional.pad(tensor, (0, stated.text), value=fill.get(name, 0))
        for name, tensor in batch.items()
        if tensor.shape == shape
    }
    return {**batch, **longer}


def _without_processor(
    model: PreTrainedModel,
    directory: Path,
    stated: Stated,
    pictures: Sequence[Image.Image],
    rows: int,
) -> tuple[Batch, str]:
    """From the configuration, and the image processor of the family."""
    images, family = rows * len(pictures), family_of(model)
    processor = _image_processor(model, directory)
    made: dict[str, Tensor] | None = None
    if processor is not None and images:
        with refusals(type(processor).__name__):
            given = processor(images=list(pictures) * rows, return_tensors="pt")
        made = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        try:
            family.check(model, {**made, "input_ids": torch.zeros(1, 1)})
            family.image_tokens(model, made)
        except GracecError:  # one of another size than the tower's, or tiles that need a tokenizer
            made = None
    # Each further prompt has a word fewer, and is padded.
    batch = family.example_batch(model, batch=rows, images=images, text=stated.text, pictures=made)
    by = "the configuration alone" if made is None else type(processor).__name__
    return batch, f"by {by}, as there is no processor"


def _image_processor(model: PreTrainedModel, directory: Path) -> Any:
    """That of the directory, else that of the family with its defaults; None if there is none."""
    if (directory / "preprocessor_config.json").is_file():
        try:
            return image_processing_auto.AutoImageProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise GracecError(
                f"no image processor can be loaded: {first_line(error)}", where=str(directory)
            ) from error
    known_classes: Any = image_processing_auto
    names = known_classes.IMAGE_PROCESSOR_MAPPING_NAMES.get(model.config.model_type)
    found = known_classes.get_image_processor_class_from_name(names["pil"]) if names else None
    if found is None:
        return None
    vision = model.config.vision_config
    known = {
        "patch_size": getattr(vision, "patch_size", None),
        "temporal_patch_size": getattr(vision, "temporal_patch_size", None),
        "merge_size": getattr(vision, "spatial_merge_size", None),
    }
    size = getattr(vision, "image_size", None)
    if isinstance(size, int) and known["merge_size"] is None:
        edge = {"height": size, "width": size}
        known |= {"size": edge, "crop_size": edge}
    return found(**{name: value for name, value in known.items() if value is not None})
