"""LLaVA-NeXT: LLaVA that looks at an image as a whole and in tiles."""

from __future__ import annotations

from typing import ClassVar

from gracec.capture.families.tiles import Tiled


class LlavaNext(Tiled):
    model_type: ClassVar[str] = "llava_next"
