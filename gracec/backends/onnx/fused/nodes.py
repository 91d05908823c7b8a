"""What the rewrites of a translated graph ask of nodes and tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gracec.backends.onnx.translate import KERNEL_DOMAIN


def only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The node that reads a value, if it is the only one and of this operator."""
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def number(node: ir.Node, name: str) -> int:
    """An attribute of a node; 0 if it is not there."""
    return node.attributes[name].as_int() if name in node.attributes else 0


def is_initializer(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.producer() is None


def insert(
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float],
    outputs: Sequence[str],
    *,
    domain: str = KERNEL_DOMAIN,
) -> Sequence[ir.Value]:
    """A new node before another one; its outputs, in which an empty name stands for none."""
    made = ir.node(
        kind,
        inputs,
        attributes,
        domain=domain,
        outputs=[ir.Value(name=name) for name in outputs],
    )
    assert before.graph is not None
    before.graph.insert_before(before, made)
    return made.outputs


def take_place(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let a value be what another one was, for nodes and as an output."""
    new.shape, new.type = old.shape, old.type
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = new
    old.replace_all_uses_with(new)


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A value with this tensor, by the name of the tensor."""
    assert tensor.name is not None
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return graph.initializers.get(name) or initializer(graph, ir.tensor(array, name=name))
