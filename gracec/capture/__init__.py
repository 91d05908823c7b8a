"""From a Hugging Face model to a `Program`."""

from gracec.capture.capture import capture, captured_equals_eager
from gracec.capture.families import Family, families, family_of

__all__ = ["Family", "capture", "captured_equals_eager", "families", "family_of"]
