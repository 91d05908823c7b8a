"""The state of an optimizer by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.training.checkpoints.fingerprint import check_json
from gracec.training.shards import write


class OptimizerState(NamedTuple):
    """The state of an optimizer, by the names of its parameters.

    Attributes:
        tensors: "state/<parameter>/<key>" and "groups/<number>/<option>"; not copied.
        scalars: groups with their parameters and options, and what a state has besides tensors.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> OptimizerState:
    """The state of an optimizer by the names of its parameters; its tensors are not copied.

    Args:
        names: name -> parameter, for instance `dict(model.named_parameters())`.

    Raises:
        GracecError: if a parameter has no name, or a state is neither a tensor nor JSON-able.
    """
    name_of = _names_of(optimizer, names)
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        members = [name_of[id(parameter)] for parameter in group["params"]]
        options = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
        tensors |= {f"groups/{number}/{k}": v for k, v in _only_tensors(options).items()}
        groups.append({"parameters": members, "options": _only_scalars(options)})
        for parameter, name in zip(group["params"], members, strict=True):
            state = optimizer.state.get(parameter)
            if not state:
                continue
            held = _only_tensors(state)
            tensors |= {f"state/{name}/{key}": value for key, value in held.items()}
            on_host = sorted(key for key, value in held.items() if value.device.type == "cpu")
            states[name] = {
                "tensors": sorted(held),
                "on_host": on_host,
                "scalars": _only_scalars(state),
            }
    scalars = {"groups": groups, "state": states}
    check_json(scalars, "optimizer")
    return OptimizerState(tensors, scalars)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], state: OptimizerState
) -> None:
    """Give an optimizer the state that `optimizer_state` took, whatever the order of parameters.

    Parameters that had no state have none afterwards. `Optimizer.load_state_dict` goes by numbers
    and casts states to the dtype of their parameter; this does neither.

    Raises:
        GracecError: if the parameters or their groups are not the same.
    """
    name_of = _names_of(optimizer, names)
    groups = _matching_groups(optimizer, name_of, state)
    for number, group in groups:
        saved = {**state.scalars["groups"][number]["options"]}
        prefix = f"groups/{number}/"
        for key, value in state.tensors.items():
            if key.startswith(prefix):
                saved[key.removeprefix(prefix)] = value
        for key in [key for key in group if key not in _NO_OPTIONS and key not in saved]:
            del group[key]
        for key, value in saved.items():
            group[key] = _like(value, group.get(key))
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            optimizer.state.pop(parameter, None)
            if name in state.scalars["state"]:
                optimizer.state[parameter] = _parameter_state(name, parameter, state)


_NO_OPTIONS = ("params", "param_names")
"""Keys of a parameter group that are no options; their order is that of the live optimizer."""


def _names_of(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[int, str]:
    """id of each parameter of the optimizer -> its first name."""
    first: dict[int, str] = {}
    for name in sorted(names):
        first.setdefault(id(names[name]), name)
    found: dict[int, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in first:
                raise GracecError(
                    f"a parameter of shape {list(parameter.shape)} has no name",
                    where=f"group {number} of the optimizer",
                    fix="give the names of all that is trained",
                )
            found[id(parameter)] = first[id(parameter)]
    return found


def _matching_groups(
    optimizer: torch.optim.Optimizer, name_of: Mapping[int, str], state: OptimizerState
) -> list[tuple[int, dict[str, Any]]]:
    """The number of the saved group and the live group, of the same parameters."""
    number_of = {
        frozenset(group["parameters"]): number
        for number, group in enumerate(state.scalars["groups"])
    }
    saved, here = frozenset[str]().union(*number_of), set(name_of.values())
    for name in sorted(saved ^ here):
        has = "the checkpoint" if name in saved else "this optimizer"
        raise _other_optimizer(f"only {has} has {name}")
    found: list[tuple[int, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        members = frozenset(name_of[id(parameter)] for parameter in group["params"])
        if members not in number_of:
            raise _other_optimizer(f"{min(members)} was in a group of other parameters")
        found.append((number_of[members], group))
    return found


def _other_optimizer(what: str) -> GracecError:
    return GracecError(
        what, where="optimizer", fix="resume with the same parameters in the same groups"
    )


def _only_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def _only_scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is no tensor; a tuple, such as the betas of Adam, as a list."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if not isinstance(value, Tensor)
    }


def _like(value: Any, live: Any) -> Any:
    """A saved option in the type of the live one: in its place, if that is a tensor."""
    if isinstance(value, Tensor):
        if isinstance(live, Tensor) and (live.shape, live.dtype) == (value.shape, value.dtype):
            return live.copy_(value)
        return value.clone()
    return tuple(value) if isinstance(live, tuple) else value


def _parameter_state(name: str, parameter: Tensor, state: OptimizerState) -> dict[str, Any]:
    saved = state.scalars["state"][name]
    result = dict(saved["scalars"])
    for key in saved["tensors"]:
        value = state.tensors[f"state/{name}/{key}"]
        device = torch.device("cpu") if key in saved["on_host"] else parameter.device
        if value.shape == parameter.shape:  # with the strides that the optimizer would give it
            copy = torch.empty_like(parameter, dtype=value.dtype, device=device)
            copy.requires_grad_(False)
        else:
            copy = torch.empty(value.shape, dtype=value.dtype, device=device)
        write(copy, value)
        result[key] = copy
    return result
