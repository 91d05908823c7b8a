"""compressed-tensors, pack-quantized: what plain transformers, and vLLM on GPUs, load.

<module>.weight_packed  int32 [N, K / 8]           eight 4-bit codes a word, the first lowest,
                                                   stored as code + 8 ([N, K / 4] for 8 bits)
<module>.weight_scale   model dtype [N, K / group_size]
<module>.weight_shape   int64 [2]                  N, K
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.utils.match import match_named_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.backends.huggingface import (
    Checkpoint,
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
from gracec.quant import row_chunks
from gracec.quant.frozen import FrozenWeight

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")


class HuggingFace(PackedFormat):
    name = "hf"
    folder = ""
    needs = "compressed-tensors"

    def model_refusal(self, frozen: Frozen, model: PreTrainedModel) -> str:
        for name, module in model.named_modules():
            if not type(module).__name__.startswith("Siglip"):
                continue
            if any(fqn.startswith(f"{name}.") for fqn in frozen.weights):
                return f"{name} is a SigLIP tower, of which transformers loads no quantized weights"
        return ""

    def notes(self, frozen: Frozen) -> tuple[str, ...]:
        schemes = {_scheme_of(weight) for weight in frozen.weights.values()}
        mixed = (
            f"{len(schemes)} schemes: load without `dequantize=True`, with which transformers "
            "reads all weights by one of them"
        )
        return (*super().notes(frozen), *([mixed] if len(schemes) > 1 else []))

    def tensors(self, frozen: Frozen) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = dict(frozen.others)
        for fqn, weight in frozen.weights.items():
            bits = weight.spec.storage_bits
            parts = [pack_to_int32(rows, bits) for (rows,) in row_chunks(weight.codes)]
            tensors[f"{fqn}_packed"] = torch.cat(parts)
            tensors[f"{fqn}_scale"] = per_channel_scales(weight).to(frozen.dtype)
            tensors[f"{fqn}_shape"] = torch.tensor(weight.shape)
        return tensors, {}

    def quantization_config(self, frozen: Frozen, model: PreTrainedModel) -> dict[str, Any]:
        groups: dict[tuple[int, int | None], list[str]] = {}
        for fqn, weight in frozen.weights.items():
            groups.setdefault(_scheme_of(weight), []).append(fqn)
        linear = set(modules_of_type(model, nn.Linear))
        modules = {*linear, *modules_of_type(model, nn.Embedding)}
        schemes = {}
        for number, ((bits, group_size), fqns) in enumerate(sorted(groups.items(), key=str)):
            inside = set(modules_of(fqns))
            targets = ["Linear"] if len(groups) == 1 else module_patterns(inside, modules - inside)
            schemes[f"group_{number}"] = QuantizationScheme(
                targets=targets,
                weights=QuantizationArgs(
                    num_bits=bits,
                    strategy="group" if group_size else "channel",
                    group_size=group_size,
                    symmetric=True,
                ),
            )
        quantized = set(modules_of(frozen.weights))
        config = QuantizationConfig(
            config_groups=schemes,
            format="pack-quantized",
            quantization_status="compressed",
            ignore=module_patterns(linear - quantized, quantized),
        )
        fields: dict[str, Any] = config.model_dump(mode="json")
        return fields

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """Which weights are quantized, and how, is found by the rules of compressed-tensors."""
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = QuantizationConfig.model_validate(fields["quantization_config"])
        model = skeleton(read_config(directory))
        names, checkpoint = stored_names(model), Checkpoint(directory)
        for scheme in config.config_groups.values():
            for name, module in match_named_modules(model, scheme.targets, config.ignore):
                if not isinstance(module, (nn.Linear, nn.Embedding)):  # the library's own rule
                    continue
                fqn = f"{name}.weight"
                stored = names.get(fqn, fqn).removesuffix("weight")
                state = {suffix: checkpoint[stored + suffix] for suffix in SUFFIXES}
                yield fqn, PackedQuantizationCompressor.decompress(state, scheme)["weight"]


def _scheme_of(weight: FrozenWeight) -> tuple[int, int | None]:
    """Stored bits, and the group size if there is more than one scale in a row."""
    grouped = weight.spec.granularity == "per_group"
    return weight.spec.storage_bits, weight.group_size if grouped else None
