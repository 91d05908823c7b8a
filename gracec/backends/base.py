"""Formats that other libraries load: what they are written from, and what they have in common.

A format packs canonical codes and scales into a Hugging Face directory and quantizes nothing. What
it wrote is read back by the code of the library that will load it, and compared with codes times
scales bit for bit.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from gracec.adapters import MERGE, adapter_tensors, adapters_of, write_adapter
from gracec.errors import GateError, GracecError
from gracec.models import configurations
from gracec.ops import dtype_name
from gracec.passes.freeze import FrozenWeight
from gracec.report import Report
from gracec.report.card import model_card

INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
ADAPTER = "adapter"
"""Folder of what `peft.PeftModel.from_pretrained` reads, beside the model that it is for."""
NO_ADAPTERS = "adapters are kept in float, which the format does not hold"
MERGE_INSTEAD = f"compile with {MERGE}"


@dataclass(frozen=True)
class Artifact:
    """A compiled model, as every format is written from it.

    Attributes:
        config: of the model.
        weights: FQN -> canonical codes and scales.
        others: FQN -> every other parameter and every persistent buffer, as the model runs them.
        dtype: what the compiled model runs in.
        adapters: linear -> scaling of the LoRA beside it, whose tensors are in `others`.
        source: name of the model that was compiled, for the model card; may be empty.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    processor: Any
    weights: Mapping[str, FrozenWeight]
    others: Mapping[str, Tensor]
    dtype: torch.dtype
    report: Report
    source: str = ""
    adapters: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        weights: Mapping[str, FrozenWeight],
        report: Report,
        *,
        dtype: torch.dtype,
        processor: Any = None,
        source: str = "",
    ) -> Artifact:
        """The artifact of a compiled model, whose planned weights may be packed already."""
        others: dict[str, Tensor] = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if name not in weights
        }
        persistent = model.state_dict()
        others |= {name: t for name, t in model.named_buffers() if name in persistent}
        generation = model.generation_config if model.can_generate() else None
        return cls(
            model.config,
            generation,
            processor,
            weights,
            others,
            dtype,
            report,
            source,
            adapters_of(model),
        )


class Format(ABC):
    """One way to write an artifact. A subclass in any imported module is a known format.

    Attributes:
        name: what a user asks for.
        folder: "" for the top level of the output directory, else a sub-directory of its own, which
            is a complete Hugging Face directory.
        needs: what has to be installed beside transformers to load it.
        tested: what was done with such directories; the model card says it.
        holds_activations: whether it can say how the input of a linear is quantized.
        holds_adapters: whether it takes adapters in float beside the weights.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    needs: ClassVar[str]
    tested: ClassVar[str]
    holds_activations: ClassVar[bool] = False
    holds_adapters: ClassVar[bool] = False

    @abstractmethod
    def weight_refusal(self, weight: FrozenWeight) -> str:
        """Why this format cannot hold a weight, or an empty string."""

    @abstractmethod
    def tensors(self, artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors to store, by the names that the model gives them, and the file's metadata."""

    @abstractmethod
    def quantization_config(self, artifact: Artifact, model: PreTrainedModel) -> dict[str, Any]:
        """What config.json says about the quantization.

        Args:
            model: of the artifact, without its weights.
        """

    @abstractmethod
    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """FQN and dense weight, one at a time, unpacked by code of the library that loads them."""

    def model_refusal(self, artifact: Artifact, model: PreTrainedModel) -> str:
        """Why this format cannot hold an artifact all of whose weights it can hold, or ""."""
        return ""

    def dtype(self, artifact: Artifact) -> torch.dtype:
        """The dtype of scales and of everything that is not quantized."""
        return artifact.dtype

    def refusal(self, artifact: Artifact) -> str:
        """Why this format cannot hold the artifact (one line), or an empty string."""
        if not artifact.weights:
            return "no weight is quantized"
        if artifact.adapters and not self.holds_adapters:
            return f"{NO_ADAPTERS}; {MERGE_INSTEAD}"
        dtype = self.dtype(artifact)
        model = empty_model(artifact.config)
        linear = {f"{name}.weight" for name in modules_of_type(model, nn.Linear)}
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        for fqn, weight in artifact.weights.items():
            if fqn not in linear - tied:
                return f"{fqn}: is tied to another, or not the weight of a linear layer"
            if weight.activation is not None and not self.holds_activations:
                return f"the input of {fqn} is quantized, which the format cannot say"
            reason = self.weight_refusal(weight)
            if not reason and not torch.equal(weight.scales.to(dtype).float(), weight.scales):
                reason = f"its scales are not exact in {dtype_name(dtype)}"
            if reason:
                return f"{fqn}: {reason}"
        return self.model_refusal(artifact, model)

    def notes(self, artifact: Artifact) -> tuple[str, ...]:
        """What a user should know about this artifact in this format."""
        narrow = sum(weight.spec.bits < 4 for weight in artifact.weights.values())
        return (f"codes narrower than 4 bits are stored in 4 ({narrow} weights)",) if narrow else ()

    def write(self, artifact: Artifact, directory: Path) -> tuple[str, ...]:
        """Write a Hugging Face directory and read it back.

        Args:
            directory: of this format; other files in it are left alone.

        Returns:
            Notes for the user.

        Raises:
            GracecError: if the format cannot hold the artifact.
            GateError: if what is read back is not codes times scales, bit for bit.
        """
        reason = self.refusal(artifact)
        if reason:
            raise GracecError(reason, where=f"format {self.name}", fix="choose another format")
        directory.mkdir(parents=True, exist_ok=True)
        notes = [*self.notes(artifact)]
        if artifact.adapters:
            artifact = self._write_adapter(artifact, directory / ADAPTER)
            notes.append(f"the adapters are in {ADAPTER}, for peft.PeftModel.from_pretrained")
        model = empty_model(artifact.config)
        _check_whole(artifact, model)
        tensors, metadata = self.tensors(artifact)
        _write_tensors(revert_weight_conversion(model, tensors), metadata, directory)
        del tensors
        config = copy.deepcopy(artifact.config)
        for part in configurations(config):
            if part.dtype is not None or part is config:
                part.dtype = self.dtype(artifact)
        config.architectures = [type(model).__name__]
        config.quantization_config = self.quantization_config(artifact, model)
        config.save_pretrained(directory)
        if artifact.generation_config is not None:
            artifact.generation_config.save_pretrained(directory)
        if artifact.processor is not None:
            write_processor(artifact.processor, directory)
        specs = sorted({str(weight.spec) for weight in artifact.weights.values()})
        card = model_card(
            artifact.report,
            source=artifact.source,
            form=self.name,
            needs=self.needs,
            tested=self.tested,
            weights=f"{len(artifact.weights)} linear weights hold integer codes "
            f"({', '.join(specs)}); everything else is in {dtype_name(self.dtype(artifact))}",
        )
        (directory / "README.md").write_text(card, encoding="utf-8")
        self._check_stored_weights(artifact, directory)
        return tuple(f"{self.name}: {note}" for note in notes)

    def _write_adapter(self, artifact: Artifact, directory: Path) -> Artifact:
        """Write the adapters as PEFT does; the artifact without them."""
        dtype, names = self.dtype(artifact), adapter_tensors(artifact.adapters)
        tensors = {name: artifact.others[name].to(dtype) for name in names}
        write_adapter(directory, artifact.adapters, tensors)
        others = {name: t for name, t in artifact.others.items() if name not in tensors}
        return replace(artifact, others=others, adapters={})

    def finish(self, artifact: Artifact, directory: Path) -> None:
        """Complete the top level of the output directory, after everything else is written."""

    def read_weights(self, directory: Path) -> dict[str, Tensor]:
        """FQN -> dense weight of every quantized weight of a directory of this format."""
        return dict(self.stored_weights(directory))

    def _check_stored_weights(self, artifact: Artifact, directory: Path) -> None:
        """The gate: the same weights are quantized, and each is codes times scales exactly."""
        missing = set(artifact.weights)
        for fqn, found in self.stored_weights(directory):
            expected = artifact.weights[fqn].dequantize(self.dtype(artifact))
            if found.dtype != expected.dtype or not torch.equal(found, expected):
                raise GateError(
                    f"{fqn} reads back other than codes times scales", where=f"format {self.name}"
                )
            missing.discard(fqn)
        if missing:
            raise GateError(f"{min(missing)} does not read back", where=f"format {self.name}")


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


def all_formats() -> dict[str, Format]:
    """Name -> every format of this package and of any module imported so far."""
    package = importlib.import_module("gracec.backends")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"gracec.backends.{module.name}")
    found: dict[str, Format] = {}
    pending = [Format]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if not inspect.isabstract(cls):
                found[cls.name] = cls()
    return dict(sorted(found.items()))


def parse_formats(names: str | Iterable[str]) -> list[Format]:
    """Formats by name: "hf,torchao", a sequence of names, or "all".

    Raises:
        GracecError: for an unknown format, with the nearest known name.
    """
    known = all_formats()
    parts = names.split(",") if isinstance(names, str) else names
    wanted = dict.fromkeys(part.strip() for part in parts)
    if "all" in wanted:
        wanted = dict.fromkeys([name for name in wanted if name != "all"] + list(known))
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise GracecError(f"unknown format {name!r}", fix=hint)
    return [known[name] for name in wanted]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this configuration whose parameters have no memory."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """FQN of each linear weight -> the name that transformers stores it under."""
    names = [f"{name}.weight" for name in modules_of_type(model, nn.Linear)]
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    renamed = revert_weight_conversion(model, numbers)
    return {names[int(number)]: stored for stored, number in renamed.items()}


def modules_of(weights: Iterable[str]) -> list[str]:
    """Names of the modules that own these weights."""
    return [fqn.rpartition(".")[0] for fqn in weights]


def kept_modules(artifact: Artifact, model: PreTrainedModel) -> list[str]:
    """The largest modules in which no linear layer is quantized, e.g. `model.vision_tower`."""
    quantized = set(modules_of(artifact.weights))
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


def _check_whole(artifact: Artifact, model: PreTrainedModel) -> None:
    """Refuse what transformers would miss, or have no place for."""
    given = {*artifact.weights, *artifact.others}
    expected = set(model.state_dict())
    for pair in model.all_tied_weights_keys.items():
        expected -= {*pair} - given if given & {*pair} else set()
    missing, unknown = sorted(expected - given), sorted(given - expected)
    if missing:
        raise GracecError(f"lacks {missing[0]}", where="artifact")
    if unknown:
        raise GracecError(f"the model has no {unknown[0]}", where="artifact")


def _write_tensors(
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
    _write_json(index, directory / INDEX)


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
        _write_json(fields, directory / "preprocessor_config.json")
    path = directory / "tokenizer_config.json"
    if path.is_file() and isinstance(processor.chat_template, str):
        fields = json.loads(path.read_text(encoding="utf-8"))
        _write_json({**fields, "chat_template": processor.chat_template}, path)
    path = directory / "processor_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    extra = fields.get("num_additional_image_tokens", 0)
    if extra and fields.get("vision_feature_select_strategy") == "default":
        fields["num_additional_image_tokens"] = extra - 1
        fields["vision_feature_select_strategy"] = "full"
        _write_json(fields, path)


def _write_json(fields: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
