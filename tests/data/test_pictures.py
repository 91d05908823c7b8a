"""Pictures: what is decoded, to what, and what a refused one says."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gracec.data import pictures
from gracec.data.conversations import TrainData, open_train_data
from gracec.data.pictures import confined, load_image, open_image, to_rgb
from gracec.data.records import Broken
from gracec.errors import GracecError, GracecWarning
from gracec.evaluate import load_samples
from tests.data.conversations import record, write


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


@pytest.mark.parametrize("background", [(255, 0, 0, 0), (0, 0, 0, 0)])
def test_what_is_transparent_is_white(tmp_path: Path, background: tuple[int, ...]) -> None:
    image = Image.new("RGBA", (2, 1), background)
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "it.png")
    seen = load_image(tmp_path / "it.png")
    assert [seen.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (10, 20, 30)]


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")]
)
def test_more_than_8_bits_are_refused(tmp_path: Path, mode: str, suffix: str) -> None:
    file = tmp_path / f"it.{suffix}"
    Image.new(mode, (4, 4), 1000).save(file)
    with pytest.raises(GracecError, match=f"more than 8 bits a pixel .mode {mode}.; save it with"):
        load_image(file)
    with pytest.raises(Broken, match="more than 8 bits"):
        to_rgb(Image.new(mode, (4, 4)), "the picture")


def test_a_picture_in_memory_that_would_start_a_program_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript would have been started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    with pytest.raises(Broken, match="it is EPS, none of PNG, JPEG"):
        to_rgb(Image.open(io.BytesIO(eps())), "the picture")


def test_a_jpeg_with_further_pictures_is_a_jpeg() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(
        buffer, "MPO", save_all=True, append_images=[Image.new("L", (4, 4))]
    )
    for image in (open_image(buffer, "it"), to_rgb(Image.open(buffer), "it")):
        assert (image.mode, image.size) == ("RGB", (8, 8))


Make = Callable[[Path], object]
UNREADABLE: dict[str, tuple[str, Make, str]] = {
    "absolute": ("/etc/hostname", lambda folder: None, "is an absolute path"),
    "drive": ("C:\\x.png", lambda folder: None, "is an absolute path"),
    "outside": ("../x.png", lambda folder: None, 'has ".." in its path'),
    "address": ("http://localhost/x.png", lambda folder: None, "is an address, nothing is fetched"),
    "link": ("x.png", lambda folder: (folder / "x.png").symlink_to("/etc/hostname"), "leads out"),
    "device": ("x.png", lambda folder: (folder / "x.png").symlink_to("/dev/zero"), "leads out"),
    "pipe": ("x.png", lambda folder: os.mkfifo(folder / "x.png"), "is not a file"),
    "folder": ("x.png", lambda folder: (folder / "x.png").mkdir(), "is not a file"),
    "program": ("x.png", lambda folder: (folder / "x.png").write_bytes(eps()), "it is none of"),
    "bomb": (
        "x.png",
        lambda folder: Image.new("1", (13_000, 13_000)).save(folder / "x.png"),
        "has more than 67108864 pixels",
    ),
}


def read(file: Path) -> TrainData:
    data = open_train_data(file)
    for number in range(len(data)):
        data.sample(number)
    return data


@pytest.mark.parametrize("kind", UNREADABLE)
def test_training_and_evaluation_refuse_the_same_pictures(tmp_path: Path, kind: str) -> None:
    name, make, message = UNREADABLE[kind]
    make(tmp_path)
    file = write(tmp_path, record(), record(name), record())
    with pytest.warns(GracecWarning, match=message):
        data = read(file)
    assert len(data.problems) == 1 and message in data.problems[0]
    file.unlink()
    (tmp_path / "samples.jsonl").write_text(
        f'{{"image": {name!r}, "question": "q", "answer": "a"}}'.replace("'", '"')
    )
    with pytest.raises(GracecError, match=f"samples.jsonl:1: image .*{message}"):
        load_samples(tmp_path)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_picture_even_where_the_user_names_it(path: str) -> None:
    with pytest.raises(GracecError, match=f"image {path} is not a file"):
        load_image(Path(path))


def test_a_pipe_is_no_picture_even_where_the_user_names_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "it.png")
    with pytest.raises(GracecError, match="is not a file"):
        load_image(tmp_path / "it.png")


def test_a_picture_below_the_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(b"123")
    assert confined(tmp_path.resolve(), "a/b.png") == (tmp_path.resolve() / "a/b.png", 3)


def test_a_path_as_windows_writes_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for file in (tmp_path / "images" / "a.png", tmp_path / "images\\b.png"):
        Image.new("RGB", (8, 8)).save(file)
    root = tmp_path.resolve()
    assert confined(root, "images\\a.png")[0] == root / "images" / "a.png"
    assert confined(root, "images\\b.png")[0] == root / "images\\b.png"  # a name of its own here
    with pytest.raises(Broken, match="does not exist"):
        confined(root, "images\\c.png")
