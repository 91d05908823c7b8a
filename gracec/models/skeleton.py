"""Models without weights: for looking at one, and as what weights are put into.

Every parameter is a stand-in that has a shape and a dtype and occupies the memory of one number.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gracec.errors import GracecError, first_line
from gracec.models.configs import check_size
from gracec.models.loading import configured_dtype, load_config
from gracec.models.surgery import configurations, set_tensor
from gracec.models.weight_files import checkpoint_files, stored_dtype


def stand_in(
    shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
) -> nn.Parameter:
    """A parameter of this shape that occupies the memory of one number."""
    one = torch.zeros((), dtype=dtype, device=device)
    return nn.Parameter(one.expand(shape), requires_grad=False)


def skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A model of a configuration, in eval mode, whose parameters are stand-ins.

    Buffers that no checkpoint holds are computed. What the configuration says about quantization
    for other libraries is left out.

    Args:
        dtype: of the parameters; by default as the configuration says.
        device: of stand-ins and buffers; by default the CPU.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if dtype is not None:
        for part in configurations(config):
            part.dtype = dtype
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype or config.dtype, trust_remote_code=False
        )
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    made = _stand_ins(model, device)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        set_tensor(model, name, made[id(parameter)])
    if device is not None:
        for name, buffer in list(model.named_buffers()):
            set_tensor(model, name, buffer.to(device))
    model.eval()
    return model


def without_weights(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """A model of its own, in eval mode, that is built as this one and has stand-ins as parameters.

    It reads the memory of the buffers of this one, unless they are moved.

    Args:
        device: where stand-ins and buffers are; by default where they are in the model.
    """
    buffers = {
        id(buffer): buffer.detach() if device is None else buffer.detach().to(device)
        for buffer in model.buffers()
    }
    copied: Any = copy.deepcopy(model, {**_stand_ins(model, device), **buffers})
    found: PreTrainedModel = copied.eval()
    return found


def _stand_ins(
    model: PreTrainedModel, device: torch.device | None = None
) -> dict[int, nn.Parameter]:
    """id of each parameter -> what stands in for it."""
    return {
        id(p): stand_in(p.shape, p.dtype, device or (None if p.is_meta else p.device))
        for p in model.parameters()
    }


def model_without_weights(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """The skeleton of a model directory.

    Its shapes, dtypes and names are those of `load_model`, so it can be captured and planned before
    any weight is read, or where none are there.

    Args:
        dtype, device: as `load_model` takes them.

    Raises:
        GracecError: if there is no usable configuration.
    """
    config = load_config(path)
    check_size(config, Path(path))
    given, dtype = dtype, dtype or configured_dtype(config)
    if dtype is None:
        try:
            dtype = stored_dtype(checkpoint_files(Path(path)))
        except GracecError:  # a model without its checkpoint can still be looked at
            dtype = None
    widened = dtype == torch.float16 and given is None and (device is None or device.type == "cpu")
    if dtype is None or widened:
        dtype = torch.float32
    try:
        return skeleton(config, dtype, device)
    except Exception as error:
        raise GracecError(
            f"no model can be built from this configuration: {first_line(error)}",
            where=str(Path(path) / "config.json"),
        ) from error
