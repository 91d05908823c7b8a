"""Pictures, which are not trusted: few formats, a limit of pixels, upright RGB."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from gracec.data.records import Broken
from gracec.errors import GracecError, first_line

MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded (8192 x 8192: 192 MiB of RGB)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What pictures may be stored as. Pillow knows more; some of those start other programs."""

# What Pillow's decoders raise for broken files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError)


def load_image(path: Path, where: str = "") -> Image.Image:
    """A picture that there has to be, as upright RGB.

    Args:
        where: the line that names it, for an error; by default the path alone.

    Raises:
        GracecError: if there is none, or `open_image` refuses it.
    """
    try:
        return open_image(Path(path), f"image {path}")
    except Broken as broken:
        raise GracecError(broken.reason, where=where) from broken


def open_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Decode a picture to upright RGB.

    Args:
        name: for messages.

    Raises:
        Broken: if it is missing, of another format, too large, or cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return to_rgb(image, name)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Broken("image too large", f"{name} has more than {MAX_PIXELS} pixels") from error
    except FileNotFoundError as error:
        raise Broken("missing image", f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        reason = f"it is none of {', '.join(FORMATS)}"
        raise Broken("corrupt image", f"{name} cannot be decoded ({reason})") from error
    except _DECODE_ERRORS as error:
        raise Broken("corrupt image", f"{name} cannot be decoded ({first_line(error)})") from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright RGB pixels; the size is known, and checked, before any is decoded.

    Raises:
        Broken: if it is too large or cannot be decoded.
    """
    if image.width * image.height > MAX_PIXELS:
        raise Broken(
            "image too large",
            f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
        )
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except _DECODE_ERRORS as error:
        raise Broken("corrupt image", f"{name} cannot be decoded ({first_line(error)})") from error


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 of the RGB pixels."""
    return hashlib.sha256(to_rgb(image, "the image").tobytes()).digest()
