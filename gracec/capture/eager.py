"""What a model computes by itself: the reference of every gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gracec.capture.culprit import culprit
from gracec.capture.families import family_of
from gracec.errors import GracecError, first_line
from gracec.models.experts import EAGER, experts_computed


def eager_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, T, V] of the model's own forward, run `as_reference`.

    Args:
        model: a Hugging Face vision-language model, or a `PeftModel` of one.
        batch: as the processor returns it.

    Raises:
        GracecError: if the model cannot run it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = family_of(base).model_inputs(base, batch)
    try:
        with as_reference(model):
            logits: Tensor = model(**inputs, use_cache=False).logits
    except GracecError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise GracecError(
            f"the model itself cannot run {shapes}: {first_line(error)}",
            where=culprit(error, base),
            fix="run it with transformers alone; its configuration may not fit its parts",
        ) from error
    return logits


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Have `nn.MultiheadAttention` and `nn.TransformerEncoder` compute as a graph of them does.

    In eval mode they have one operator for a whole layer, which rounds otherwise; whether it is
    used depends on whether a weight could have a gradient.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Have a model compute, in place, as one that others are held to; it is left as it was.

    In eval mode and without gradients: of weights that could have one, operators may choose another
    kernel. Routed experts by the loop, and attention by the operators, that every model has:
    kernels that do all at once round otherwise, or as the memory lies.
    """
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        with torch.no_grad(), experts_computed(model, EAGER), no_fast_path():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)
