"""onnxruntime: ONNX graphs with INT4 codes, run by ONNX Runtime on the processor.

Graphs that a directory holds are run as they are; others are written into a temporary folder.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from gracec.backends.onnx.format import Onnx
from gracec.frozen import Frozen
from gracec.gates import LogitAgreement
from gracec.journal import Note
from gracec.kernels.onnxruntime import AUTO, FAITHFUL
from gracec.targets.base import Runtime, Target

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

    def agrees(
        self, runtime: Runtime, found: LogitAgreement, dense: LogitAgreement, dtype: torch.dtype
    ) -> float:
        """Where inputs or the head are in 8 bits, the gate of fast mode; `write` has held the
        graphs to what was asked for."""
        from gracec.backends.onnx import gates

        config = cast("OnnxModel", runtime).session_config
        if config.mode == FAITHFUL and "fqn" not in config.gates.get("head", {}):
            return super().agrees(runtime, found, dense, dtype)
        gates.rounding_is_small(found)
        return gates.ROUNDED_KL

    def exact(self, runtime: Runtime, frozen: Frozen) -> Frozen | None:
        config = cast("OnnxModel", runtime).session_config
        if frozen.onnx.mode != AUTO or config.mode == FAITHFUL:
            return None
        return replace(frozen, onnx=frozen.onnx.model_copy(update={"mode": FAITHFUL}))

    def read(self, directory: Path) -> OnnxModel:
        from gracec.backends.onnx.runner import OnnxModel

        return OnnxModel.load(directory)
