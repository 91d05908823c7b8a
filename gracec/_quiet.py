"""Drops three kinds of log line that libraries print and nobody can act on."""

from __future__ import annotations

import logging

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
