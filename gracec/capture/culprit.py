"""Which module, and which line of whose code, an error of torch.export comes from.

The model's own Python code runs while it is traced, so the error's traceback passes through the
`forward` methods of the model. The innermost module on it is the culprit, and the last line in its
code that is not torch's is the construct that cannot be traced.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent / "capture.py")


def culprit(error: BaseException, model: nn.Module) -> str:
    """`model.vision_tower at .../modeling_clip.py:209`; the model's class if nothing is known."""
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    module, source, left = type(model).__name__, "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = names.get(id(frame.f_locals.get("self")))
        if owner is not None:
            module = owner
        file = frame.f_code.co_filename
        if file.startswith(_TORCH) or not Path(file).is_file():
            # Below the last module torch's code may call back into others'; that is not the cause.
            left = owner is None and source != ""
        elif not left and file != _HERE:
            source = f"{file}:{line}"
    return f"{module} at {source}" if source else module
