"""torchao's IntxUnpackedToInt8Tensor in safetensors, as transformers loads it with TorchAoConfig.

    <module>._weight_qdata       int8 [N, K]                       one code a byte
    <module>._weight_scale       model dtype [N, K / group_size]
    <module>._weight_zero_point  int8 [N, K / group_size]          zeros

torchao's own 4-bit tensors in safetensors run on GPUs only, so a code takes 8 bits on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import (
    FqnToConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
)
from transformers import PreTrainedModel, TorchAoConfig

from gracec.backends.huggingface import (
    Checkpoint,
    kept_modules,
    module_patterns,
    modules_of,
    modules_of_type,
    per_channel_scales,
    stored_names,
)
from gracec.backends.packed import PackedFormat
from gracec.frozen import Frozen
from gracec.models.configs import read_config
from gracec.models.skeleton import skeleton
from gracec.quant.frozen import FrozenWeight

SUFFIXES = ("qdata", "scale", "zero_point")


class TorchAo(PackedFormat):
    name = "torchao"
    folder = "torchao"
    needs = "torchao"

    def notes(self, frozen: Frozen) -> tuple[str, ...]:
        return ("a code takes 8 bits on disk; torchao's 4-bit files run on GPUs only",)

    def tensors(self, frozen: Frozen) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        names = [*frozen.weights, *frozen.others]
        for name in names:
            weight = frozen.weights.get(name)
            whole = frozen.others[name].detach() if weight is None else intx(weight, frozen)
            flat, described = flatten_tensor_state_dict({name: whole})
            tensors |= flat
            metadata |= described
        return tensors, {**metadata, "tensor_names": json.dumps(names)}

    def quantization_config(self, frozen: Frozen, model: PreTrainedModel) -> dict[str, Any]:
        groups: dict[str, list[str]] = {}
        for fqn, weight in frozen.weights.items():
            groups.setdefault(str(weight.spec), []).append(fqn)
        modules = {*modules_of_type(model, nn.Linear), *modules_of_type(model, nn.Embedding)}
        schemes: dict[str, IntxWeightOnlyConfig] = {}
        for fqns in groups.values():
            inside = set(modules_of(fqns))
            scheme = _scheme_of(frozen.weights[fqns[0]])
            schemes |= dict.fromkeys(module_patterns(inside, modules - inside), scheme)
        config = TorchAoConfig(
            FqnToConfig(schemes) if len(groups) > 1 else scheme,
            modules_to_not_convert=kept_modules(frozen.weights, model),
        )
        fields: dict[str, Any] = config.to_dict()
        return fields

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        model = skeleton(read_config(directory))
        names, checkpoint = stored_names(model), Checkpoint(directory)
        metadata = checkpoint.metadata()
        for fqn in json.loads(metadata["tensor_names"]):
            if json.loads(metadata[fqn])["_type"] == "Tensor":
                continue
            prefix = f"{fqn.removesuffix('weight')}_weight_"
            stored = f"{names[fqn].removesuffix('weight')}_weight_"
            flat = {prefix + suffix: checkpoint[stored + suffix] for suffix in SUFFIXES}
            described = {"tensor_names": json.dumps([fqn]), fqn: metadata[fqn]}
            whole, _ = unflatten_tensor_state_dict(flat, described)
            yield fqn, whole[fqn].dequantize()


def intx(weight: FrozenWeight, frozen: Frozen) -> IntxUnpackedToInt8Tensor:
    """Codes and scales as torchao's tensor, exactly."""
    scales = per_channel_scales(weight).to(frozen.dtype)
    return IntxUnpackedToInt8Tensor(
        qdata=weight.codes,
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=_code_dtype(weight),
        block_size=[1, weight.group_size],
        dtype=frozen.dtype,
        activation_quantization=None,
    )


def _scheme_of(weight: FrozenWeight) -> IntxWeightOnlyConfig:
    grouped = weight.spec.granularity == "per_group"
    granularity = PerGroup(weight.group_size) if grouped else PerAxis(0)
    return IntxWeightOnlyConfig(weight_dtype=_code_dtype(weight), granularity=granularity)


def _code_dtype(weight: FrozenWeight) -> torch.dtype:
    found: torch.dtype = getattr(torch, f"int{8 if weight.spec.bits > 4 else weight.spec.bits}")
    return found
