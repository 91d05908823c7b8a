"""What directories for other libraries have in common: shards, names of modules, the processor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from gracec.errors import GateError, GracecError
from gracec.quant.frozen import FrozenWeight

INDEX = "model.safetensors.index.json"


MAX_SHARD_SIZE = "5GB"


class Checkpoint:
    """The stored tensors of a directory, read one at a time by the names that they have on disk."""

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        self._file_of: dict[str, str] = index["weight_map"]
        names = sorted(set(self._file_of.values()))
        self._files = {name: safe_open(directory / name, framework="pt") for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise GateError("was not written", where=name)
        file: Any = self._files[self._file_of[name]]
        tensor: Tensor = file.get_tensor(name)
        return tensor

    def metadata(self) -> dict[str, str]:
        """Of all files together."""
        files: list[Any] = list(self._files.values())
        return {key: text for file in files for key, text in file.metadata().items()}


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """FQN of each linear weight -> the name that it is stored under."""
    names = [f"{name}.weight" for name in modules_of_type(model, nn.Linear)]
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    renamed = as_released(model, numbers)
    return {names[int(number)]: stored for stored, number in renamed.items()}


TOWER = "vision_model"
"""What CLIP and SigLIP towers have around them in released checkpoints. transformers 5 takes it off
as it loads, and puts it back into no model but those that it has loaded so."""


def as_released(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by FQN -> by the names that released checkpoints of the family have.

    Programs with a loader of their own, vLLM and llama.cpp among them, know no others.

    Args:
        model: what transformers builds from the configuration; it is told how to be saved.
    """
    saved: Any = model
    saved._weight_conversions = [
        one
        for one in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(one, PrefixChange) or one.prefix_to_remove == TOWER
    ]
    renamed: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return renamed


def modules_of(weights: Iterable[str]) -> list[str]:
    """Names of the modules that own these weights."""
    return [fqn.rpartition(".")[0] for fqn in weights]


def kept_modules(weights: Iterable[str], model: PreTrainedModel) -> list[str]:
    """The largest modules in which no linear layer is quantized, e.g. `model.vision_tower`."""
    quantized = set(modules_of(weights))
    return largest_modules(set(modules_of_type(model, nn.Linear)) - quantized, quantized)


def modules_of_type(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of all modules of a class."""
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def largest_modules(inside: Iterable[str], outside: Iterable[str]) -> list[str]:
    """The fewest modules that hold all layers of `inside` and none of `outside`."""
    taken = {prefix for name in outside for prefix in _prefixes(name)}
    return sorted({next(p for p in _prefixes(name) if p not in taken) for name in inside})


def module_patterns(inside: Iterable[str], outside: Iterable[str]) -> list[str]:
    """Regular expressions that match all layers of `inside` and none of `outside`.

    Each names the end of a path, with one module above it where the end alone is ambiguous. Readers
    may put other modules before and between the two, as they do.
    """
    inside, outside = set(inside), set(outside)
    found: dict[str, None] = {}
    for path in largest_modules(inside, outside):
        rest = "$" if path in inside else r"\..*"
        patterns = (pattern + rest for pattern in _path_patterns(path))
        fits = next(p for p in patterns if not any(re.match(p, name) for name in outside))
        found[f"re:{fits}"] = None
    return list(found)


def _path_patterns(path: str) -> Iterator[str]:
    parts = [re.escape(part) for part in path.split(".")]
    for start in reversed(range(len(parts))):
        end = r"\.".join(parts[start:])
        yield rf"(.*\.)?{end}"
        for above in (part for part in parts[:start] if not part.isdigit()):
            yield rf"(.*\.)?{above}\.(.*\.)?{end}"


def per_channel_scales(weight: FrozenWeight) -> Tensor:
    """Scales [N, K / group_size]; one scale for the whole weight is repeated for each channel."""
    return weight.scales.expand(weight.shape[0], -1)


def _prefixes(name: str) -> list[str]:
    """a.b.c -> [a, a.b, a.b.c]"""
    return list(accumulate(name.split("."), lambda path, part: f"{path}.{part}"))


def check_whole(given: Set[str], model: PreTrainedModel) -> None:
    """Refuse what transformers would miss, or have no place for."""
    expected = set(model.state_dict())
    for pair in model.all_tied_weights_keys.items():
        expected -= {*pair} - given if given & {*pair} else set()
    missing, unknown = sorted(expected - given), sorted(given - expected)
    if missing:
        raise GracecError(f"lacks {missing[0]}", where="artifact")
    if unknown:
        raise GracecError(f"the model has no {unknown[0]}", where="artifact")


def write_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], directory: Path
) -> None:
    """Shards and their index.

    The index is written for a single file too: readers that would take every safetensors file of
    the directory then take only those of the model.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        save_file(part, directory / file, metadata={"format": "pt", **metadata})
        (directory / file).chmod(0o644)  # safetensors lets nobody but the owner read it
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(index, directory / INDEX)


def write_processor(processor: Any, directory: Path) -> None:
    """The processor, written so that transformers.js reads the same one as transformers.

    transformers.js looks for the image processor and the chat template in files of their own, and
    never subtracts the class token from the visual tokens of an image.
    """
    processor.save_pretrained(directory)
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is not None:
        fields = json.loads(image_processor.to_json_string())
        fields["processor_class"] = type(processor).__name__
        write_json(fields, directory / "preprocessor_config.json")
    path = directory / "tokenizer_config.json"
    if path.is_file() and isinstance(processor.chat_template, str):
        fields = json.loads(path.read_text(encoding="utf-8"))
        write_json({**fields, "chat_template": processor.chat_template}, path)
    path = directory / "processor_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    extra = fields.get("num_additional_image_tokens", 0)
    if extra and fields.get("vision_feature_select_strategy") == "default":
        fields["num_additional_image_tokens"] = extra - 1
        fields["vision_feature_select_strategy"] = "full"
        write_json(fields, path)


def write_json(fields: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
