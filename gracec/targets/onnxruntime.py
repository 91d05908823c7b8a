"""onnxruntime: ONNX graphs with INT4 codes, run by ONNX Runtime on the processor.

Graphs that a directory holds are run as they are; others are written into a temporary folder.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from gracec.backends.onnx.format import Onnx
from gracec.frozen import Frozen
from gracec.journal import Note
from gracec.targets.base import Target

if TYPE_CHECKING:
    from gracec.backends.onnx.runner import OnnxModel


class OnnxRuntime(Target):
    name: ClassVar[str] = "onnxruntime"
    aliases: ClassVar[tuple[str, ...]] = ("onnx",)
    passes: ClassVar[tuple[str, ...]] = Onnx.passes
    reads: ClassVar[bool] = True

    def refusal(self, frozen: Frozen) -> str:
        return Onnx().refusal(frozen)

    def lower(self, frozen: Frozen, *, strict: bool = False) -> tuple[OnnxModel, Sequence[Note]]:
        """The graphs hold every gate of their own, which run when they are written."""
        from gracec.backends.onnx.runner import OnnxModel  # takes a second to import

        folder = tempfile.TemporaryDirectory(prefix="gracec-onnx-")
        notes = Onnx().write(frozen, Path(folder.name))
        model = OnnxModel(Path(folder.name), frozen.config, frozen.generation_config)
        weakref.finalize(model, folder.cleanup)
        return model, [Note(Onnx.name, note) for note in notes]

    def read(self, directory: Path) -> OnnxModel:
        from gracec.backends.onnx.runner import OnnxModel

        return OnnxModel.load(directory)
