"""A quantized model as a value: what every format, target and artifact is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from gracec.models.devices import same_device
from gracec.models.experts import GROUPED, compute_experts
from gracec.models.lora import adapters_of
from gracec.models.skeleton import stand_in, without_weights
from gracec.models.surgery import (
    configurations,
    fill_while_running,
    names_of_one,
    quantize_inputs,
    set_tensor,
)
from gracec.quant.frozen import FrozenWeight
from gracec.recipe import OnnxDeploy


@dataclass(frozen=True)
class Reference:
    """What lowered models are held to.

    Attributes:
        batch: as the processor returns it, padded on the left.
        logits: [B, S, V] of the frozen graph, at all positions or the last ones.
    """

    batch: Mapping[str, Tensor]
    logits: Tensor

    def tail(self, tensor: Tensor) -> Tensor:
        """The positions of a tensor [B, T, ...] that there are logits of."""
        return tensor[:, -self.logits.shape[1] :]

    def short(self, positions: int = 8) -> Reference:
        """The same with the last positions alone, in little memory."""
        return Reference(self.batch, self.logits[:, -positions:].clone())


@dataclass(frozen=True)
class Frozen:
    """A model whose planned weights are integer codes and scales. Nothing changes it.

    Attributes:
        skeleton: the model without weights, with the places of its adapters.
        weights: FQN -> canonical codes and scales.
        others: FQN -> every other parameter, in `dtype`, and every persistent buffer.
        dtype: what the model runs in.
        processor: of the model, or None.
        name: of the model that was compiled, for the model card; may be empty.
        revision: its commit on the Hugging Face Hub; empty if it was a directory.
        passes: further passes, as text with their places, that lowering runs as well.
        onnx: how ONNX graphs of it are written, where nothing else is asked for.
        reference: what models made from it are held to; an artifact that was read has none.
    """

    skeleton: PreTrainedModel
    weights: Mapping[str, FrozenWeight]
    others: Mapping[str, Tensor]
    dtype: torch.dtype
    processor: Any = None
    name: str = ""
    revision: str = ""
    passes: tuple[str, ...] = ()
    onnx: OnnxDeploy = field(default_factory=OnnxDeploy)
    reference: Reference | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        weights: Mapping[str, FrozenWeight],
        dtype: torch.dtype,
        *,
        cast: bool = True,
        **more: Any,
    ) -> Frozen:
        """From a model and the codes of its planned weights.

        Args:
            cast: put `others` into `dtype`, in memory of their own: one view into a checkpoint
                would keep the whole file mapped. Otherwise they are as they are.
            more: the other attributes.
        """
        others: dict[str, Tensor] = {
            # Not the buffers: rotary frequencies stay in float32.
            name: parameter.detach().to(dtype, copy=True) if cast else parameter.detach()
            for name, parameter in model.named_parameters()
            if name not in weights
        }
        persistent = model.state_dict()
        others |= {name: t for name, t in model.named_buffers() if name in persistent}
        return cls(without_weights(model), weights, others, dtype, **more)

    @property
    def device(self) -> torch.device:
        """Of codes, scales and everything else."""
        found: torch.device = self.skeleton.device
        return found

    def to(self, device: torch.device) -> Frozen:
        """The same on a device, where targets pack the codes for its kernels."""
        if same_device(self.device, device):
            return self
        moved = {name: tensor.to(device) for name, tensor in self.others.items()}
        reference = self.reference
        if reference is not None:
            batch = {name: tensor.to(device) for name, tensor in reference.batch.items()}
            reference = Reference(batch, reference.logits.to(device))
        return replace(
            self,
            skeleton=without_weights(self.skeleton, device),
            weights=_Moved(self.weights, device),
            others=moved,
            reference=reference,
        )

    @property
    def config(self) -> PreTrainedConfig:
        """Of the model; not to be changed."""
        found: PreTrainedConfig = self.skeleton.config
        return found

    @property
    def generation_config(self) -> GenerationConfig | None:
        """Of the model, if it generates."""
        return self.skeleton.generation_config if self.skeleton.can_generate() else None

    @property
    def adapters(self) -> dict[str, float]:
        """Linear -> scaling of the LoRA beside it, whose tensors are in `others`."""
        return adapters_of(self.skeleton)


class _Moved(Mapping[str, FrozenWeight]):
    """FQN -> a weight on a device, moved at each access and not kept there."""

    def __init__(self, weights: Mapping[str, FrozenWeight], device: torch.device) -> None:
        self._weights, self._device = weights, device

    def __getitem__(self, fqn: str) -> FrozenWeight:
        return self._weights[fqn].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def build(frozen: Frozen, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of its own, in eval mode, with stand-ins in the place of the quantized weights.

    Args:
        dtype: what it runs in; by default that of `frozen`, with which it shares its tensors.
    """
    dtype = dtype or frozen.dtype
    model = without_weights(frozen.skeleton)
    for part in configurations(model.config):
        part.dtype = dtype
    buffers, names = dict(model.named_buffers()), names_of_one(model)
    tensors = {n: t if n in buffers else _to(t, dtype) for n, t in frozen.others.items()}
    tensors |= {
        fqn: stand_in(weight.held_shape, dtype, weight.stored.device)
        for fqn, weight in frozen.weights.items()
    }
    for fqn, tensor in tensors.items():
        one = tensor if fqn in buffers else nn.Parameter(tensor, requires_grad=False)
        for name in names.get(fqn, [fqn]):  # what was one weight is one again, and nothing else
            set_tensor(model, name, one)
    compute_experts(model, GROUPED)
    model.requires_grad_(False)
    return model


def dense_twin(frozen: Frozen, dtype: torch.dtype, *, rounded: bool = True) -> PreTrainedModel:
    """The same, but each quantized layer has its weight, codes times scales, while it runs.

    Args:
        rounded: let linears put their inputs on the grids that `frozen` has for them.
    """
    model = build(frozen, dtype)
    left = {fqn: model.get_parameter(fqn) for fqn in frozen.weights}
    fill_while_running(
        model,
        frozen.weights,
        lambda fqn: frozen.weights[fqn].dequantize(dtype),
        lambda fqn: left[fqn],
    )
    grids = {fqn: weight.activation for fqn, weight in frozen.weights.items() if rounded}
    quantize_inputs(model, {fqn: grid for fqn, grid in grids.items() if grid is not None})
    return model


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
