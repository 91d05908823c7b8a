"""From a Hugging Face model to a `Program`."""

from gracec.capture.capture import capture, captured_equals_eager
from gracec.capture.families import GENERIC, Family, families, family_for, family_of
from gracec.capture.serving import capture_serving

__all__ = [
    "GENERIC",
    "Family",
    "capture",
    "capture_serving",
    "captured_equals_eager",
    "families",
    "family_for",
    "family_of",
]
