"""Has libraries say less: log lines that nobody can act on, and usage data of ONNX Runtime."""

from __future__ import annotations

import logging
import os

# torchao tries to load CUDA libraries on every machine, and registers its enums the old way; torch
# mentions a symbol of a trace that fails, whose place gracec names itself.
NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "torch.fx.experimental.symbolic_shapes": "Unable to find user code",
}


class _Noise(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def drop_import_noise() -> None:
    """Has to run before transformers is imported, which imports torchao."""
    for name, text in NOISE.items():
        logging.getLogger(name).addFilter(_Noise(text))


def keep_usage_data() -> None:
    """Has to run before ONNX Runtime is imported, whose packages send usage data to their maker.

    A user who wants them to sets the variable to 0.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
