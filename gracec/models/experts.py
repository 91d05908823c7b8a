"""Routed experts of a decoder: how they are computed where a graph or packed weights need it.

transformers computes experts in one of several ways, chosen by the configuration: its own loop
("eager"), whose sizes depend on data, so that no trace can hold it; and others that round
otherwise. gracec adds one, which is the loop with `gracec::expert_linear` in it: the same rows in
the same matmuls, and the answers of the experts of a token added up in the same order, which is
that of the experts. So a graph computes what the loop computes, bit for bit, wherever elementwise
operators round a number alike in whatever tensor it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gracec.kernels.torchao import packed_expert_linear
from gracec.quant.ops_experts import expert_linear

GROUPED, EAGER = "gracec_expert_linear", "eager"
"""Names that transformers knows ways to compute experts by."""


GRIDS = "gracec_input_grids"


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of routed experts [E, N, K] as transformers does.

    One that is computed some other way, by a model with code of its own, does not.
    """
    known = ("num_experts", "is_transposed", "has_gate", "has_bias", "config")
    return all(hasattr(module, name) for name in known)


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """Path -> each module of a model that `holds_experts`."""
    return {path: module for path, module in model.named_modules() if holds_experts(module)}


def compute_experts(model: nn.Module, how: str) -> None:
    """Have the experts of one's own model computed in one way from now on."""
    for module in expert_modules(model).values():
        module.config._experts_implementation = how


def quantize_expert_inputs(module: Any, name: str, rounded: Callable[[Tensor], Tensor]) -> None:
    """Let experts round what they multiply with one of their weights first."""
    setattr(module, GRIDS, {**getattr(module, GRIDS, {}), name: rounded})


def pack_experts(model: nn.Module, fqn: str, weights: Sequence[Tensor]) -> None:
    """Put packed weights [N, K], one an expert, in the place of the weight of all of them."""
    owner, _, name = fqn.rpartition(".")
    module = model.get_submodule(owner)
    delattr(module, name)
    parameters = [nn.Parameter(weight, requires_grad=False) for weight in weights]
    module.register_module(name, nn.ParameterList(parameters))


@contextmanager
def experts_computed(model: nn.Module, how: str) -> Iterator[None]:
    """Have experts computed in one way meanwhile; a compiled model knows only one."""
    configs = {id(m.config): m.config for m in expert_modules(model).values()}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for key, config in configs.items():
            if before[key] != GROUPED:
                config._experts_implementation = how
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def _forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the module's own loop computes.

    Args:
        hidden_states: [T, H].
        top_k_index, top_k_weights: [T, C], the experts of each token and how much each counts.
    """
    tokens, chosen = top_k_index.shape[0], top_k_index.shape[1]
    # The loop gives an expert the tokens that chose it first before those that chose it second.
    experts = top_k_index.t().reshape(-1)
    rows = hidden_states.repeat(chosen, 1)
    inner = _project(self, "gate_up_proj" if self.has_gate else "up_proj", rows, experts)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    found = _project(self, "down_proj", inner, experts)
    if self.has_post_expert_norm:
        found = self.post_expert_norm(found)
    found = found * top_k_weights.t().reshape(-1, 1)
    found = found.to(hidden_states.dtype).reshape(chosen, tokens, -1)
    order = top_k_index.argsort(dim=-1).t().unsqueeze(-1).expand_as(found)
    first, *others = found.gather(0, order).unbind(0)
    for other in others:
        first = first + other
    return first


def _project(module: Any, name: str, rows: Tensor, experts: Tensor) -> Tensor:
    weight = getattr(module, name)
    if name in getattr(module, GRIDS, {}):
        rows = getattr(module, GRIDS)[name](rows)
    if isinstance(weight, nn.ParameterList):
        found = packed_expert_linear(rows, list(weight), experts)
    else:
        each = weight.transpose(1, 2) if module.is_transposed else weight
        found = expert_linear(rows, each, experts, module.num_experts)
    if module.has_bias:
        found = found + getattr(module, f"{name}_bias")[experts]
    return found


ALL_EXPERTS_FUNCTIONS.register(GROUPED, _forward)
