"""Formats that other programs load, one file each."""

from gracec.backends.base import FORMATS, Format, all_formats, parse_formats

__all__ = ["FORMATS", "Format", "all_formats", "parse_formats"]
