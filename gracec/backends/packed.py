"""Formats that are Hugging Face directories with packed weights, which transformers loads."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.backends.base import CardFacts, Format
from gracec.backends.huggingface import (
    as_released,
    check_whole,
    modules_of_type,
    write_processor,
    write_tensors,
)
from gracec.frozen import Frozen
from gracec.models.lora import adapter_tensors, write_adapter
from gracec.models.skeleton import skeleton
from gracec.models.surgery import configurations
from gracec.quant.frozen import FrozenWeight
from gracec.quant.ops import dtype_name

ADAPTER = "adapter"
"""Folder of what `peft.PeftModel.from_pretrained` reads, beside the model that it is for."""


class PackedFormat(Format):
    """A complete Hugging Face directory; `config.json` says how its weights are packed.

    Attributes:
        needs: what has to be installed beside transformers to load it.
        tested: what was done with such directories; the model card says it.
    """

    needs: ClassVar[str]
    tested: ClassVar[str] = (
        "The tests of gracec load such directories with transformers on the CPU and get the logits "
        "of the dense weights bit for bit, and the same tokens. No GPU runtime was run."
    )
    holds_adapters: ClassVar[bool] = True

    def weight_refusal(self, weight: FrozenWeight) -> str:
        """Why this format cannot hold a weight, or an empty string."""
        return ""

    @abstractmethod
    def tensors(self, frozen: Frozen) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors to store, by the names that the model gives them, and the file's metadata."""

    @abstractmethod
    def quantization_config(self, frozen: Frozen, model: PreTrainedModel) -> dict[str, Any]:
        """What config.json says about the quantization.

        Args:
            model: what transformers builds from the configuration, without weights.
        """

    def model_refusal(self, frozen: Frozen, model: PreTrainedModel) -> str:
        """Why this format cannot hold a model all of whose weights it can hold, or ""."""
        return ""

    def refusal(self, frozen: Frozen) -> str:
        if not frozen.weights:
            return "no weight is quantized"
        if reason := super().refusal(frozen):
            return reason
        dtype = self.dtype(frozen)
        model = skeleton(frozen.config)
        linear = {f"{name}.weight" for name in modules_of_type(model, nn.Linear)}
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        for fqn, weight in frozen.weights.items():
            if fqn not in linear - tied:
                return f"{fqn}: is tied to another, or not the weight of a linear layer"
            reason = self.weight_refusal(weight)
            if not reason and not torch.equal(weight.scales.to(dtype).float(), weight.scales):
                reason = f"its scales are not exact in {dtype_name(dtype)}"
            if reason:
                return f"{fqn}: {reason}"
        return self.model_refusal(frozen, model)

    def notes(self, frozen: Frozen) -> tuple[str, ...]:
        """What a user should know about this model in this format."""
        narrow = sum(weight.spec.bits < 4 for weight in frozen.weights.values())
        return (f"codes narrower than 4 bits are stored in 4 ({narrow} weights)",) if narrow else ()

    def card(self, frozen: Frozen) -> CardFacts | None:
        specs = sorted({str(weight.spec) for weight in frozen.weights.values()})
        weights = (
            f"{len(frozen.weights)} linear weights hold integer codes ({', '.join(specs)}); "
            f"everything else is in {dtype_name(self.dtype(frozen))}"
        )
        return CardFacts(self.needs, self.tested, weights)

    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        self.check(frozen)
        directory.mkdir(parents=True, exist_ok=True)
        notes, generation = [*self.notes(frozen)], frozen.generation_config
        if frozen.adapters:
            frozen = self._write_adapter(frozen, directory / ADAPTER)
            notes.append(f"the adapters are in {ADAPTER}, for peft.PeftModel.from_pretrained")
        model = skeleton(frozen.config)
        check_whole({*frozen.weights, *frozen.others}, model)
        tensors, metadata = self.tensors(frozen)
        write_tensors(as_released(model, tensors), metadata, directory)
        del tensors
        config = copy.deepcopy(frozen.config)
        for part in configurations(config):
            if part.dtype is not None or part is config:
                part.dtype = self.dtype(frozen)
        config.architectures = [type(model).__name__]
        config.quantization_config = self.quantization_config(frozen, model)
        config.save_pretrained(directory)
        if generation is not None:
            generation.save_pretrained(directory)
        if frozen.processor is not None:
            write_processor(frozen.processor, directory)
        self.check_stored_weights(frozen, directory)
        return tuple(notes)

    def _write_adapter(self, frozen: Frozen, directory: Path) -> Frozen:
        """Write the adapters as PEFT does; the model without them."""
        dtype, names = self.dtype(frozen), adapter_tensors(frozen.adapters)
        tensors = {name: frozen.others[name].to(dtype) for name in names}
        write_adapter(directory, frozen.adapters, tensors)
        others = {name: t for name, t in frozen.others.items() if name not in tensors}
        return replace(frozen, others=others, skeleton=skeleton(frozen.config))
