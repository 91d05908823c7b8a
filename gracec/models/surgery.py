"""Changes to a model that is one's own: tensors put in, heads untied, inputs of linears rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)

from gracec.models.experts import holds_experts, quantize_expert_inputs


def configurations(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and those of its parts; a model may lack one that its class has."""
    parts = (getattr(config, name) for name in config.sub_configs)
    return [config, *(part for part in parts if part is not None)]


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of this name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, attribute, tensor)


def names_of_one(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all names that it has in the model, the first among them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: found for found in names.values()}


def put_on(model: PreTrainedModel, device: torch.device) -> None:
    """Move one's own model. Weights that are one stay one, which `to` promises on few devices."""
    ones = names_of_one(model)
    model.to(device)  # type: ignore[arg-type]
    for first, names in ones.items():
        for name in names[1:]:
            set_tensor(model, name, model.get_parameter(first))


def fill_while_running(
    model: nn.Module,
    names: Iterable[str],
    filled: Callable[[str], Tensor],
    left: Callable[[str], Tensor],
) -> list[RemovableHandle]:
    """Let each of some parameters hold one tensor while its module runs, and another afterwards.

    Args:
        filled, left: FQN -> the tensor during a run, and after it.

    Returns:
        Handles that undo it.
    """
    handles = []
    for fqn in names:
        owner = model.get_submodule(fqn.rpartition(".")[0])
        for hook, made, options in (
            (owner.register_forward_pre_hook, filled, {}),
            (owner.register_forward_hook, left, {"always_call": True}),
        ):

            def put(*_: Any, fqn: str = fqn, made: Callable[[str], Tensor] = made) -> None:
                set_tensor(model, fqn, made(fqn))

            handles.append(hook(put, **options))
    return handles


def quantize_inputs(
    model: nn.Module, activations: Mapping[str, Callable[[Tensor], Tensor]]
) -> None:
    """Let linears and experts round their input first, as the graph does.

    Args:
        activations: FQN of a weight -> what puts the input of its linear on its grid.
    """

    def hook(rounded: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args: (rounded(args[0]), *args[1:])

    for fqn, rounded in activations.items():
        owner, _, name = fqn.rpartition(".")
        module = model.get_submodule(owner)
        if holds_experts(module):
            quantize_expert_inputs(module, name, rounded)
        else:
            module.register_forward_pre_hook(hook(rounded))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own that reads the very same memory; what is replaced in it, stays in it."""
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    buffers = {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, {**parameters, **buffers})


def own_tensors(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[int, Tensor]]:
    """A copy with parameters and buffers of its own; id of each of the model's -> its copy."""
    parameters: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    copies = {**parameters, **{id(b): b.detach().clone() for b in model.buffers()}}
    return copy.deepcopy(model, dict(copies)), copies


def own_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to be trained: weights of its own, in float32."""
    owned = share_weights(model)
    for parameter in owned.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return owned
