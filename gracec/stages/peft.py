"""A model of PEFT becomes a model: adapters merged into the weights, or kept in float beside."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gracec.errors import GateError, GracecError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # passes import this file, and not transformers
from gracec.models.lora import LoraLinear, adapters_of

MERGE = 'adapters="merge"'


def merge_adapters(model: Any, *, inplace: bool = False) -> tuple[PreTrainedModel, str]:
    """A model whose adapters of PEFT are part of its weights.

    Args:
        model: a `PeftModel`.
        inplace: let the caller's model be taken apart.

    Returns:
        The model, and what to tell the user.

    Raises:
        GracecError: if the adapters cannot be merged.
    """
    from transformers import PreTrainedModel

    names = ", ".join(model.active_adapters)
    try:
        merged = (model if inplace else copy.deepcopy(model)).merge_and_unload(safe_merge=True)
    except Exception as error:
        raise GracecError(
            f"adapters {names} cannot be merged: {first_line(error)}", where=type(model).__name__
        ) from error
    assert isinstance(merged, PreTrainedModel)
    return merged, f"adapters of PEFT merged into the weights: {names}"


def keep_adapters(model: Any) -> tuple[PreTrainedModel, str]:
    """A model whose adapters of PEFT stay beside its weights, as `LoraLinear` in their places.

    Modules that were trained as a whole (`modules_to_save`) become part of the model.

    Args:
        model: a `PeftModel` in eval mode, which is taken apart.

    Returns:
        The model, and what to tell the user.

    Raises:
        GracecError: if an adapter is something else than one LoRA on a plain linear.
        GateError: if the logits are not those of PEFT bit for bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from gracec.capture import family_of

    names = ", ".join(model.active_adapters)
    base = model.get_base_model()
    inputs = family_of(base).model_inputs(base, family_of(base).example_batch(base))
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    layers: dict[str, Any] = {
        name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    for name, layer in layers.items():
        reason = _unfit(layer)
        if reason:
            raise GracecError(
                f"{reason}, which is not kept in float", where=name, fix=f"use {MERGE}"
            )
        for active in _active(layer):  # one, or none
            low, high = layer.lora_A[active], layer.lora_B[active]
            linear = LoraLinear(layer.get_base_layer(), low.out_features, layer.scaling[active])
            linear.lora_A.weight, linear.lora_B.weight = low.weight, high.weight
            base.set_submodule(name, linear)
    kept: PreTrainedModel = model.unload()
    with torch.no_grad():
        found = kept(**inputs, use_cache=False).logits
    if not torch.equal(expected, found):
        difference = (expected.double() - found.double()).abs().max().item()
        raise GateError(
            f"with adapters kept in float the logits differ from those of PEFT by {difference:.3g}",
            where=type(kept).__name__,
            fix=f"use {MERGE}",
        )
    count = len(adapters_of(kept))
    return kept, f"adapters of PEFT kept in float: {names}, beside {count} linears"


def _active(layer: Any) -> list[str]:
    """The adapters that change what a LoRA layer computes."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _unfit(layer: Any) -> str:
    """Why a layer of PEFT is no LoRA on a plain linear, or an empty string."""
    from peft.tuners import lora

    base, kind = layer.get_base_layer(), type(layer).__name__
    if type(layer) is not lora.Linear or type(base) is not nn.Linear:
        return f"the adapter is a {kind} of PEFT on a {type(base).__name__}"
    active = _active(layer)
    if len(active) > 1:
        return f"{len(active)} adapters are active at once"
    if layer.merged:
        return "the adapter is merged already"
    for name in active:
        if name in layer.lora_variant:
            return f"the adapter is a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
        if layer.lora_bias[name]:
            return "the adapter has a bias"
    return "the adapter is transposed (fan_in_fan_out)" if layer.fan_in_fan_out else ""
