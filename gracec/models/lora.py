"""LoRA adapters of PEFT: merged into the weights, or kept in float beside quantized ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from gracec.errors import GracecError

if TYPE_CHECKING:
    pass  # passes import this file, and not transformers


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
