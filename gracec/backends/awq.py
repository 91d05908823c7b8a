"""AWQ with GEMM packing, as AutoAWQ wrote it and GPU runtimes read it.

    <module>.qweight  int32 [K, N / 8]              eight output features a word, in the order
                                                    0, 2, 4, 6, 1, 3, 5, 7, stored as code + 8
    <module>.qzeros   int32 [K / group_size, N / 8] 8 everywhere, packed in the same way
    <module>.scales   float16 [K / group_size, N]

The layout is that of AWQ; the scales come from gracec and not from activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from torch import Tensor
from transformers import PreTrainedModel

from gracec.backends.huggingface import Checkpoint, kept_modules, modules_of, stored_names
from gracec.backends.packed import PackedFormat
from gracec.frozen import Frozen
from gracec.models.configs import read_config
from gracec.models.skeleton import skeleton
from gracec.quant.frozen import FrozenWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP_SIZES = (32, 64, 128)
SUFFIXES = ("qweight", "qzeros", "scales")


class Awq(PackedFormat):
    name = "awq"
    folder = "awq"
    needs = "gptqmodel"
    holds_adapters = False
    tested = (
        "The converter of compressed-tensors for AutoAWQ checkpoints did it. The tests of gracec "
        "generate the tokens of the dense weights from such directories with gptqmodel on the CPU, "
        "where it is installed. No GPU runtime was run."
    )

    def dtype(self, frozen: Frozen) -> torch.dtype:
        return torch.float16

    def weight_refusal(self, weight: FrozenWeight) -> str:
        rows = weight.shape[0]
        if weight.spec.bits > 4:
            return f"AWQ holds 4-bit codes, these have {weight.spec.bits} bits"
        if weight.spec.granularity != "per_group" or weight.group_size not in GROUP_SIZES:
            return f"AWQ has groups of {GROUP_SIZES}, this has {weight.spec}"
        if rows % 8:
            return f"AWQ packs 8 output features together, there are {rows}"
        return ""

    def model_refusal(self, frozen: Frozen, model: PreTrainedModel) -> str:
        sizes = sorted({weight.group_size for weight in frozen.weights.values()})
        if len(sizes) > 1:
            return f"AWQ has one group size for all weights, there are {sizes}"
        head = model.get_output_embeddings()
        keys = _keys(frozen, model)
        for name in modules_of(frozen.weights):
            if model.get_submodule(name) is head:
                return f"{name}: readers of AWQ never look for a quantized head"
            if any(key in name for key in keys):
                return f"{name}: AWQ cannot tell it from a module that is not quantized"
        for name, tensor in frozen.others.items():
            if not torch.isfinite(tensor.to(torch.float16)).all():
                return f"{name}: overflows float16"
        return ""

    def notes(self, frozen: Frozen) -> tuple[str, ...]:
        changed = sum(
            not torch.equal(tensor.to(torch.float16).to(tensor.dtype), tensor)
            for tensor in frozen.others.values()
        )
        rounded = f"{changed} of {len(frozen.others)} tensors changed by it"
        return (*super().notes(frozen), f"unquantized tensors cast to float16, {rounded}")

    def tensors(self, frozen: Frozen) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor
            for name, tensor in frozen.others.items()
        }
        for fqn, weight in frozen.weights.items():
            module = fqn.removesuffix("weight")
            scales = weight.scales.to(torch.float16).t().contiguous()
            tensors[f"{module}qweight"] = pack(weight.codes.t())
            tensors[f"{module}qzeros"] = pack(torch.zeros_like(scales, dtype=torch.int8))
            tensors[f"{module}scales"] = scales
        return tensors, {}

    def quantization_config(self, frozen: Frozen, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(frozen.weights.values())).group_size,
            "zero_point": True,
            "modules_to_not_convert": _keys(frozen, model),
        }

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        config = read_config(directory)
        converter = AutoAWQConverter.from_autoawq_config(config.quantization_config)
        scheme = converter.update_config(None).config_groups["config_group_0"]
        model = skeleton(config)
        checkpoint = Checkpoint(directory)
        for fqn, name in stored_names(model).items():
            if any(key in fqn for key in config.quantization_config["modules_to_not_convert"]):
                continue
            stored = name.removesuffix("weight")
            packed = {stored + suffix: checkpoint[stored + suffix] for suffix in SUFFIXES}
            state = {k.removeprefix(stored): v for k, v in converter.process(packed).items()}
            yield fqn, PackedQuantizationCompressor.decompress(state, scheme)["weight"]


def pack(codes_KN: Tensor) -> Tensor:
    """int8 codes [K, N] in [-8, 7] -> int32 [K, N / 8]."""
    rows, columns = codes_KN.shape
    nibbles = (codes_KN.to(torch.int32) + 8).reshape(rows, columns // 8, 8)
    packed = torch.zeros(rows, columns // 8, dtype=torch.int32)
    for place, column in enumerate(ORDER):
        packed |= nibbles[:, :, column] << (4 * place)
    return packed


def _keys(frozen: Frozen, model: PreTrainedModel) -> list[str]:
    """What must not be converted: whole paths for readers that match the start of a name, and the
    shortest ends of paths for readers that search within a name and have other names above."""
    quantized = modules_of(frozen.weights)
    paths = kept_modules(frozen.weights, model)
    return sorted({*paths, *(_short_end(path, quantized) for path in paths)})


def _short_end(path: str, outside: list[str]) -> str:
    """The shortest end of a path that is in no name of `outside`, or the whole path."""
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
    return next((end for end in ends if not any(end in name for name in outside)), path)
