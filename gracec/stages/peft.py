"""A model of PEFT becomes a model: adapters merged into the weights, or kept in float beside."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec import gates
from gracec.capture.eager import eager_logits
from gracec.capture.families import family_of
from gracec.errors import GracecError, first_line
from gracec.journal import Error
from gracec.models.lora import MERGE, LoraLinear, adapters_of

MERGED_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Of the largest logit: a merged weight is rounded once, a weight and its adapter apart."""


def merge_adapters(model: Any, *, inplace: bool = False) -> tuple[PreTrainedModel, str, Error]:
    """A model whose adapters of PEFT are part of its weights.

    A weight that is in two places, as a tied head is, becomes two before an adapter is merged into
    one of them.

    Args:
        model: a `PeftModel`.
        inplace: let the caller's model be taken apart.

    Returns:
        The model, what to tell the user, and how far its logits are from those of PEFT.

    Raises:
        GracecError: if the adapters cannot be merged.
        GateError: if the logits are not those of PEFT.
    """
    names = ", ".join(model.active_adapters)
    merged = (model if inplace else copy.deepcopy(model)).eval()
    batch = _example_batch(merged.get_base_model())
    expected = eager_logits(merged, batch)
    _part_adapted(merged.get_base_model())
    try:
        merged = merged.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise GracecError(
            f"adapters {names} cannot be merged: {first_line(error)}", where=type(model).__name__
        ) from error
    assert isinstance(merged, PreTrainedModel)
    bound, where = MERGED_BOUND[merged.dtype], f"adapters {names}, merged"
    change = gates.logits_are_those_of("PEFT", expected, eager_logits(merged, batch), bound, where)
    figure = Error(change, bound, "of the largest logit, against PEFT")
    return merged, f"adapters of PEFT merged into the weights: {names}", figure


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
    names = ", ".join(model.active_adapters)
    base = model.get_base_model()
    batch = _example_batch(base)
    expected = eager_logits(model, batch)
    for name, layer in _adapted(base).items():
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
    where = f"adapters {names}, kept in float"
    gates.logits_are_those_of("PEFT", expected, eager_logits(kept, batch), 0.0, where)
    count = len(adapters_of(kept))
    return kept, f"adapters of PEFT kept in float: {names}, beside {count} linears"


def _example_batch(base: PreTrainedModel) -> dict[str, Tensor]:
    return family_of(base).example_batch(base)


def _adapted(base: nn.Module) -> dict[str, Any]:
    """Name -> each layer that has adapters of PEFT, in use or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)
    }


def _part_adapted(base: nn.Module) -> None:
    """Give each layer with adapters a weight of its own, where it shares one with another."""
    uses = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
    for layer in _adapted(base).values():
        linear = layer.get_base_layer()
        for name, parameter in linear.named_parameters(recurse=False):
            if uses[id(parameter)] > 1:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                linear.register_parameter(name, own)


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
