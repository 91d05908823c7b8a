"""Pictures, which are not trusted: few formats, a limit of pixels, upright RGB on white.

Every picture that gracec sees is read here: training, calibration, evaluation, reports and single
questions. The pixels are those that transformers alone makes of a file, which its processors put on
white where it is transparent, and which it turns upright when it opens the file itself.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from gracec.data.records import Broken, is_address, short
from gracec.errors import GracecError, first_line

MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded (8192 x 8192: 192 MiB of RGB)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What pictures may be stored as. Pillow knows more; some of those start other programs."""

_OPENED_AS = (None, *FORMATS, "MPO")
"""What Pillow calls a picture of these; None is no file, MPO a JPEG with further pictures."""


def load_image(path: Path, where: str = "") -> Image.Image:
    """A picture that there has to be, as upright RGB; its path is the caller's own.

    Args:
        where: the line that names it, for an error; by default the path alone.

    Raises:
        GracecError: if there is none, or `open_image` refuses it.
    """
    try:
        return open_image(Path(path), f"image {path}")
    except Broken as broken:
        raise GracecError(broken.reason, where=where) from broken


def as_loaded(image: Image.Image, where: str) -> Image.Image:
    """A picture in memory as `load_image` would give it.

    Raises:
        GracecError: if `to_rgb` refuses it.
    """
    try:
        return to_rgb(image, "the picture")
    except Broken as broken:
        raise GracecError(broken.reason, where=where) from broken


def confined(root: Path, name: str) -> tuple[Path, int]:
    """The file of a picture that data names, and its size in bytes.

    Args:
        root: a resolved folder, which the picture has to lie below.
        name: the path relative to it, as the data has it.

    Raises:
        Broken: if it is an address, leads out of the folder, or is no file.
    """
    if name.startswith("file://"):
        name = _below(root, unquote(name.removeprefix("file://").removeprefix("localhost")))
    if is_address(name) or name.startswith("data:"):
        raise Broken("image path", f"image {short(name)} is an address, nothing is fetched")
    flavours = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.is_absolute() or path.drive or path.root for path in flavours):
        raise Broken("image path", f"image {short(name)} is an absolute path")
    if any(".." in path.parts for path in flavours):
        raise Broken("image path", f'image {short(name)} has ".." in its path')
    try:
        if "\\" in name and not os.path.lexists(root / name):
            name = flavours[1].as_posix()  # as Windows writes it
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise Broken("image path", f"image {short(name)} leads out of the image root")
        found = path.stat()
    except FileNotFoundError as error:
        raise Broken("missing image", f"image {short(name)} does not exist") from error
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise Broken(
            "missing image", f"image {short(name)} cannot be read ({first_line(error)})"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise Broken("missing image", f"image {short(name)} is not a file")
    return path, found.st_size


def _below(root: Path, name: str) -> str:
    """The path of a file:// address relative to a folder, if it is one below it."""
    try:
        return Path(name).resolve().relative_to(root).as_posix() if name[:1] == "/" else name
    except (OSError, ValueError, RuntimeError):
        return name


def open_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Decode a picture to upright RGB; of an animated one the first frame.

    Args:
        name: for messages.

    Raises:
        Broken: if it is missing, no file, of another format, too large, or `to_rgb` refuses it.
    """
    try:
        with _stream(file, name) as stream, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=FORMATS) as image:
                return to_rgb(image, name)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Broken("image too large", f"{name} has more than {MAX_PIXELS} pixels") from error
    except FileNotFoundError as error:
        raise Broken("missing image", f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise Broken("missing image", f"{name} is not a file") from error
    except UnidentifiedImageError as error:
        raise _corrupt(name, f"it is none of {', '.join(FORMATS)}") from error
    except Broken:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise _corrupt(name, first_line(error)) from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright RGB pixels, on white; the size is known, and checked, before any is decoded.

    Raises:
        Broken: if it is too large, was opened as a format that is not read, has more than 8 bits a
            channel, or cannot be decoded.
    """
    if image.width * image.height > MAX_PIXELS:
        raise Broken(
            "image too large",
            f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
        )
    if getattr(image, "format", None) not in _OPENED_AS:  # decoded when it is asked for pixels
        raise _corrupt(name, f"it is {image.format}, none of {', '.join(FORMATS)}")
    if image.mode.startswith(("I", "F")):
        # Processors clip it, so that nearly all of it is white, and no scale is known to be meant.
        raise Broken(
            "more than 8 bits",
            f"{name} has more than 8 bits a pixel (mode {image.mode}); save it with 8, scaled",
        )
    try:
        image.load()
        return _on_white(ImageOps.exif_transpose(image))
    except Exception as error:
        raise _corrupt(name, first_line(error)) from error


def _on_white(image: Image.Image) -> Image.Image:
    """RGB as processors of transformers make it: what is transparent shows white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


@contextmanager
def _stream(file: Path | io.BytesIO, name: str) -> Iterator[BinaryIO]:
    """What to decode. A pipe or a device would block or never end, even to see what it is."""
    if isinstance(file, io.BytesIO):
        yield file
        return
    with open(file, "rb", opener=_unblocked) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise Broken("missing image", f"{name} is not a file")
        yield stream


def _unblocked(file: str, flags: int) -> int:
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def _corrupt(name: str, reason: str) -> Broken:
    return Broken("corrupt image", f"{name} cannot be decoded ({reason})")


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 of the RGB pixels."""
    return hashlib.sha256(to_rgb(image, "the image").tobytes()).digest()
