"""What is done to every trace, so that equal models give equal graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, fx, nn

from gracec.ir.program import annotate
from gracec.ir.queries import VIEWS


def drop_casts_that_change_nothing(graph_module: fx.GraphModule) -> None:
    """`x.to(dtype)` of a tensor that has the dtype returns the tensor itself, and so do we."""
    casts = {torch.ops.aten.to.dtype, torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout}
    for node in list(graph_module.graph.nodes):
        if node.target in casts:
            source = node.all_input_nodes[0]
            before, after = source.meta.get("val"), node.meta.get("val")
            if before is not None and (before.dtype, before.device) == (after.dtype, after.device):
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
    graph_module.recompile()


def write_no_padding_as_a_number(graph_module: fx.GraphModule) -> None:
    """`conv2d(padding="valid")` is a convolution like others; torch.onnx does not know it."""
    defaults = {"bias": None, "stride": [1, 1], "padding": "valid", "dilation": [1, 1], "groups": 1}
    for node in graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.conv2d.padding
    ):
        given = dict(zip(("input", "weight", *defaults), node.args, strict=False)) | node.kwargs
        found = {**defaults, **given}
        if found["padding"] == "valid":
            found["padding"] = [0, 0]
            node.target = torch.ops.aten.conv2d.default
            inputs = given["input"], given["weight"]
            node.args, node.kwargs = (*inputs, *(found[name] for name in defaults)), {}
    graph_module.recompile()


def compute_into_a_new_tensor(graph_module: fx.GraphModule) -> None:
    """`x /= y`, as routers write it, and `x *= y`, where nobody reads `x` but what comes before:
    ONNX and gradients have no operators that change a tensor."""
    aten = torch.ops.aten
    new = {aten.div_.Tensor: aten.div.Tensor, aten.mul_.Tensor: aten.mul.Tensor}
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if node.target not in new:
            continue
        changed = node.args[0]
        fresh = changed.op == "call_function" and changed.target not in VIEWS
        others = [user for user in changed.users if user is not node]
        seen = [user for user in others if user.target in VIEWS or order[user] > order[node]]
        if fresh and not seen:
            node.target = new[node.target]
    graph_module.recompile()


def mark_adapters(graph_module: fx.GraphModule, linears: set[str]) -> None:
    """Annotate what an adapter computes, A, B and their addition: passes take it for no layer.

    Args:
        linears: paths of the linears that have one.
    """
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        stack: Any = node.meta.get("nn_module_stack") or {"": ("", None)}
        path, _ = list(stack.values())[-1]
        added = path in linears and node.target != torch.ops.aten.linear.default
        if added or path.rpartition(".")[0] in linears:
            annotate(node, adapter="lora")


def normalised_fqns(
    graph_module: fx.GraphModule, model: nn.Module, prefix: str
) -> dict[str, tuple[str, ...]]:
    """Attribute path in the graph -> names in the model's state dict, tied names together."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    fqns = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        own_name = str(node.target).removeprefix(prefix)
        if own_name in tensors:  # a constant that export lifted has no name in the model
            fqns[str(node.target)] = tuple(names[id(tensors[own_name])])
    return fqns
