"""LoRA adapters of PEFT: merged into the weights, or kept in float beside quantized ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gracec.errors import GateError, GracecError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # passes import this file, and not transformers

MERGE = 'adapters="merge"'


class LoraLinear(nn.Linear):
    """A linear with a LoRA in float: x [..., K] -> W x + b + scaling * B A x, [..., N].

    `weight` [N, K] and `bias` keep the names that they have in a plain linear, so that plans,
    codes and checkpoints name them as always. Beside them are `lora_A.weight` [r, K] and
    `lora_B.weight` [N, r], which may have another dtype.

    Args:
        linear: gives weight and bias; they are shared with it.
        rank: r.
    """

    def __init__(self, linear: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device="meta")
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device="meta")
        self.scaling = scaling
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        update = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * self.scaling
        summed: Tensor = result + update
        return summed.to(result.dtype)


def adapters_of(model: nn.Module) -> dict[str, float]:
    """Name of each linear with an adapter in float -> the scaling of the adapter."""
    return {
        name: module.scaling
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def adapter_tensors(adapters: Iterable[str]) -> list[str]:
    """FQNs of the tensors of the adapters of some linears, A and B of each."""
    return [f"{name}.lora_{part}.weight" for name in adapters for part in "AB"]


def attach_adapters(
    model: nn.Module, adapters: Mapping[str, float], tensors: Mapping[str, Tensor]
) -> None:
    """Put places for adapters into a model, in place; they have no values yet.

    Args:
        adapters: what `adapters_of` found in another model of this configuration.
        tensors: FQN -> tensor; those of `adapter_tensors` say the ranks.

    Raises:
        GracecError: if a tensor is missing, or is for a linear that the model does not have.
    """
    for name, scaling in adapters.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = nn.Identity()
        missing = [fqn for fqn in adapter_tensors([name]) if fqn not in tensors]
        if missing or not isinstance(linear, nn.Linear):
            reason = f"{missing[0]} is missing" if missing else "the model has no such linear"
            raise GracecError(reason, where=f"adapter of {name}", fix="compile the model again")
        rank = tensors[f"{name}.lora_A.weight"].shape[0]
        model.set_submodule(name, LoraLinear(linear, rank, scaling))


def has_adapters(model: Any) -> bool:
    """Whether a model is a `PeftModel` whose adapters change its linears.

    Raises:
        GracecError: if adapters are in a model that is none.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise GracecError(
            "adapters of PEFT are inside the model",
            where=type(model).__name__,
            fix="load them with peft.PeftModel.from_pretrained and compile that model",
        )
    return hasattr(model, "merge_and_unload")


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


def write_adapter(
    directory: Path, adapters: Mapping[str, float], tensors: Mapping[str, Tensor]
) -> None:
    """Write adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        directory: is made.
        adapters: linear -> scaling.
        tensors: those of `adapter_tensors`, by name.
    """
    ranks = {name: tensors[f"{name}.lora_A.weight"].shape[0] for name in adapters}
    alphas = {name: scaling * ranks[name] for name, scaling in adapters.items()}
    first = next(iter(adapters))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alphas[first]},
        "target_modules": sorted(adapters),
    }
    directory.mkdir()
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    named = {f"base_model.model.{fqn}": tensors[fqn] for fqn in adapter_tensors(adapters)}
    path = directory / "adapter_model.safetensors"
    save_file({n: t.contiguous() for n, t in named.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody but the owner read it
