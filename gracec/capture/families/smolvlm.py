"""SmolVLM: Idefics3 by another name."""

from __future__ import annotations

from typing import ClassVar

from gracec.capture.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    model_type: ClassVar[str] = "smolvlm"
