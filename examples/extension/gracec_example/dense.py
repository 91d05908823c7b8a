"""dense: codes times scales as ordinary weights, for programs that read no quantized ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import AutoModelForImageTextToText

from gracec.backends import Format
from gracec.backends.huggingface import write_processor
from gracec.frozen import Frozen, build
from gracec.models.surgery import set_tensor


class Dense(Format):
    name: ClassVar[str] = "dense"
    folder: ClassVar[str] = "dense"

    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        self.check(frozen)
        model = build(frozen)
        for fqn, weight in frozen.weights.items():
            set_tensor(model, fqn, weight.dequantize(frozen.dtype))
        model.save_pretrained(directory)
        if frozen.processor is not None:
            write_processor(frozen.processor, directory)
        self.check_stored_weights(frozen, directory)
        return (f"{len(frozen.weights)} quantized weights are written as {frozen.dtype}",)

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """All weights: such a directory does not say which of them were quantized."""
        model = AutoModelForImageTextToText.from_pretrained(directory, local_files_only=True)
        yield from model.named_parameters()
