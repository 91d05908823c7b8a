"""Pixels and tokens against those that transformers alone makes of the same file, in every family.

transformers reads a file in two ways: by its path, upright but with alpha dropped, and as a picture
that Pillow opened, on white but not upright. gracec does what is right of both, so that each mode
is held to the way that reads it rightly, and to both where they agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from gracec.data.collate import Collator
from gracec.data.conversations import open_train_data
from gracec.data.prompts import encode_questions
from gracec.errors import GracecError
from gracec.evaluate import load_image, load_samples
from tests.tiny import tiny_llava
from tests.tiny_families import PROCESSORS, tiny_processor

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # opened by transformers
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Palette images with Transparency"),
]

QUESTION, ANSWER = "what is this ?", "red"
SIZE = (48, 40)


def noise(mode: str, seed: int = 0) -> Image.Image:
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    shape = (SIZE[1], SIZE[0]) if channels == 1 else (SIZE[1], SIZE[0], channels)
    drawn = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, SIZE, drawn.tobytes())


def save_palette(path: Path) -> None:
    noise("RGB").quantize(16).save(path)


def save_transparent_palette(path: Path) -> None:
    noise("RGB").quantize(16).save(path, transparency=bytes([0, 64, 128, 255] * 4))


def save_keyed_colour(path: Path) -> None:
    Image.new("RGB", SIZE, (200, 10, 30)).save(path, transparency=(200, 10, 30))


def save_palette_alpha(path: Path) -> None:
    image = Image.frombytes("PA", SIZE, noise("LA").tobytes())
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def save_animated(path: Path) -> None:
    frames = [noise("RGB", seed).quantize(16) for seed in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to look at it
    noise("RGB").save(path, exif=exif)


AS_PATH, OPENED = "path", "opened by Pillow"
BOTH = (AS_PATH, OPENED)
MODES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "1": ("1.png", lambda path: noise("L").convert("1").save(path), BOTH),
    "L": ("l.png", lambda path: noise("L").save(path), BOTH),
    "LA": ("la.png", lambda path: noise("LA").save(path), (OPENED,)),
    "P": ("p.png", save_palette, BOTH),
    "P, transparent": ("pt.png", save_transparent_palette, (OPENED,)),
    "PA": ("pa.tiff", save_palette_alpha, (OPENED,)),
    "RGB": ("rgb.png", lambda path: noise("RGB").save(path), BOTH),
    "RGB, one colour transparent": ("key.png", save_keyed_colour, BOTH),
    "RGBA": ("rgba.png", lambda path: noise("RGBA").save(path), (OPENED,)),
    "RGBA, webp": ("rgba.webp", lambda path: noise("RGBA").save(path, lossless=True), (OPENED,)),
    "CMYK": ("cmyk.jpg", lambda path: noise("CMYK").save(path), BOTH),
    "animated": ("animated.gif", save_animated, BOTH),
    "EXIF": ("turned.jpg", save_turned, (AS_PATH,)),
}


CONVERT_NOTHING = ("idefics2", "lfm2_vl")
"""Families whose image processor, or the stand-in for it, takes pictures in RGB alone: what
transformers makes of another mode is an error, or something that nobody meant."""


@cache
def processor_of(family: str) -> Any:
    return tiny_processor(family)


def by_transformers(processor: Any, file: Path, way: str) -> dict[str, Any]:
    """What transformers makes of a question about a file, without a line of gracec."""
    picture = str(file) if way == AS_PATH else Image.open(file)
    options: dict[str, Any] = {"return_tensors": "pt"}
    if not processor.chat_template:
        return dict(processor(images=[picture], text=[f"<image>\n{QUESTION}"], **options))
    key = "path" if way == AS_PATH else "image"
    content = [{"type": "image", key: picture}, {"type": "text", "text": QUESTION}]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **options,
        )
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_family_sees_what_transformers_alone_makes_of_the_file(
    tmp_path: Path, mode: str
) -> None:
    name, save, ways = MODES[mode]
    file = tmp_path / name
    save(file)
    line = {"image": name, "question": QUESTION, "answer": ANSWER}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line))
    trained = open_train_data(tmp_path).sample(0)
    (evaluated,) = load_samples(tmp_path)
    assert evaluated.image == file
    for family in PROCESSORS:
        if family in CONVERT_NOTHING and mode not in ("RGB", "EXIF"):
            continue
        processor = processor_of(family)
        asked = encode_questions(processor, [QUESTION], [load_image(file)])
        batch = Collator(processor, tiny_llava())([trained])
        for way in ways:
            alone = by_transformers(processor, file, way)
            alone.pop("labels", None)
            assert asked.keys() == alone.keys(), family
            for key in alone:
                assert torch.equal(asked[key], alone[key]), f"{family}: {key} as {way}"
            vision = alone.keys() - {"input_ids", "attention_mask"}
            for key in (key for key in vision if "token_type" not in key):
                assert torch.equal(batch[key], alone[key]), f"{family}, trained: {key} as {way}"
            prompt = alone["input_ids"][0]
            if processor.chat_template:  # the end of a prompt without one is another
                assert torch.equal(batch["input_ids"][0, : len(prompt)], prompt), family


def test_the_two_ways_of_transformers_differ_where_this_file_says_so(tmp_path: Path) -> None:
    processor = processor_of("llava")
    for mode, (name, save, ways) in MODES.items():
        save(tmp_path / name)
        path, opened = (
            by_transformers(processor, tmp_path / name, way)["pixel_values"] for way in BOTH
        )
        assert torch.equal(path, opened) == (ways == BOTH), mode


@pytest.mark.parametrize("family", [name for name in PROCESSORS if name != "lfm2_vl"])
def test_16_bits_which_transformers_alone_makes_white_are_refused(
    tmp_path: Path, family: str
) -> None:
    file = tmp_path / "it.png"
    grey = np.random.default_rng(0).integers(256, 1 << 16, (SIZE[1], SIZE[0]), dtype=np.uint16)
    Image.fromarray(grey).save(file)
    processor = processor_of(family)
    white = tmp_path / "white.png"
    Image.new("RGB", SIZE, "white").save(white)
    for way in BOTH:
        found, blank = (by_transformers(processor, one, way) for one in (file, white))
        assert torch.equal(found["pixel_values"], blank["pixel_values"])
    with pytest.raises(GracecError, match="more than 8 bits"):
        load_image(file)


def test_an_animated_picture_is_its_first_frame(tmp_path: Path) -> None:
    save_animated(tmp_path / "it.gif")
    with Image.open(tmp_path / "it.gif") as image:
        first = next(iter(ImageSequence.Iterator(image))).convert("RGB")
    assert load_image(tmp_path / "it.gif").tobytes() == first.tobytes()
