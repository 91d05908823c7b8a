"""Pictures: what is decoded, to what, and what a refused one says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from gracec.data import pictures
from gracec.data.pictures import load_image, open_image, to_rgb
from gracec.data.records import Broken
from gracec.errors import GracecError


def test_a_picture_is_upright_rgb(tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right
    Image.new("L", (40, 20)).save(turned, exif=exif)
    image = load_image(turned)
    assert (image.mode, image.size) == ("RGB", (20, 40))


def eps() -> bytes:
    """A format that Pillow reads by starting Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "image .*/it.png does not exist"),
        (b"not a picture", "image .*/it.png cannot be decoded .it is none of PNG, JPEG"),
        (eps(), "image .*/it.png cannot be decoded .it is none of PNG, JPEG"),
    ],
)
def test_a_picture_that_cannot_be_read_is_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "it.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(GracecError, match=f"^{message}") as caught:
        load_image(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(GracecError, match=f"^samples.jsonl:3: {message}"):
        load_image(file, where="samples.jsonl:3")


def test_the_limit_of_pixels_holds_for_files_and_for_pictures_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "it.png"
    image = Image.new("RGB", (10, 10))
    image.save(file)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 99)
    with pytest.raises(GracecError, match="it.png has 10 x 10 pixels, more than 99"):
        load_image(file)
    with pytest.raises(Broken, match="the picture has 10 x 10 pixels, more than 99"):
        to_rgb(image, "the picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(Broken, match="it.png has more than 99 pixels"):
        open_image(file, "it.png")
