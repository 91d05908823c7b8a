"""Linears that read the same input are one: q, k and v, and gate and up.

    MatMulNBits(x, codes_q, scales_q), ..._k, ..._v  ->  Split(MatMulNBits(x, codes, scales))

Codes and scales of the one are those of the parts side by side along N, which is how MatMulNBits
lays them out: [N, K / block, bytes]. So where the tensors of the parts lie next to each other in
the data file, the one is the range of all of them, and nothing is stored twice. `place_together`
has them written so. A bias, an addition after a part, becomes the bias of the kernel.

In a small decoder a call costs as much as a part of its work, and two calls are two waits for
threads: at the size of SmolLM2-135M the joined linears take some percent off a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from gracec.backends.onnx.fused.nodes import (
    constant,
    initializer,
    insert,
    is_initializer,
    number,
    only_user,
    take_place,
)
from gracec.errors import GracecError
from gracec.kernels.onnxruntime import MATMUL_NBITS

LAYOUT = ("K", "bits", "block_size", "accuracy_level")
KINDS = ("codes", "scales", "bias")
STORED_AGAIN = 1 << 16
"""Bytes up to which tensors that are not next to each other are stored once more, together: those
too small for the data file, and biases that layers share."""


@dataclass(frozen=True)
class Linear:
    """A MatMulNBits and the addition after it, if there is one.

    Attributes:
        tensors: codes, scales and, with an addition, the bias.
        result: what others read.
    """

    node: ir.Node
    tensors: tuple[ir.Value, ...]
    result: ir.Value

    @property
    def features(self) -> int:
        return number(self.node, "N")


def parallel_linears(graph: ir.Graph) -> list[list[Linear]]:
    """Linears that read one input and have one layout, in groups of two or more."""
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for node in graph:
        if node.op_type == MATMUL_NBITS and len(node.inputs) == 3:
            linear = _linear(node)
            layout = tuple(number(node, name) for name in LAYOUT)
            key = (node.inputs[0], layout, len(linear.tensors))
            groups.setdefault(key, []).append(linear)
    return [group for group in groups.values() if len(group) > 1]


def place_together(graph: ir.Graph) -> None:
    """Order the initializers so that what `fuse_linears` joins is written side by side."""
    for group in parallel_linears(graph):
        for values in zip(*(linear.tensors for linear in group), strict=True):
            for value in values:
                if len(value.uses()) == 1:  # what layers share is next to nobody's
                    graph.initializers.pop(str(value.name))
                    graph.register_initializer(value)


def fuse_linears(graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    """Join all groups in place.

    Returns:
        Name of a joined weight -> the FQNs of its parts, in order.

    Raises:
        GracecError: if large tensors of a group are not next to each other in the file.
    """
    joined: dict[str, tuple[str, ...]] = {}
    for group in parallel_linears(graph):
        fqns = [str(linear.tensors[0].name).removesuffix(".codes") for linear in group]
        name = _joined_name(fqns)
        tensors = []
        for place, values in enumerate(zip(*(linear.tensors for linear in group), strict=True)):
            parts = [value.const_value for value in values if value.const_value is not None]
            tensors.append(initializer(graph, side_by_side(parts, f"{name}.{KINDS[place]}")))
        _replace(group, tensors, name)
        joined[name] = tuple(fqns)
    return joined


def side_by_side(parts: Sequence[ir.TensorProtocol], name: str) -> ir.TensorProtocol:
    """Tensors [N, ...] as one along N: the range of a file that holds them, or small ones again.

    Raises:
        GracecError: if they are large and not next to each other in one file.
    """
    shapes = [part.shape.numpy() for part in parts]
    shape = ir.Shape((sum(rows for rows, *_ in shapes), *shapes[0][1:]))
    if _are_adjacent(parts):
        first = parts[0]
        assert isinstance(first, ir.ExternalTensor)
        return ir.ExternalTensor(
            first.location,
            first.offset,
            sum(part.nbytes for part in parts),
            first.dtype,
            shape=shape,
            name=name,
            base_dir=first.base_dir,
        )
    size = sum(part.nbytes for part in parts)
    if size > STORED_AGAIN:
        raise GracecError(
            f"{len(parts)} tensors of {size:,} bytes do not lie next to each other", where=name
        )
    return ir.tensor(np.concatenate([part.numpy() for part in parts]), name=name)


def _are_adjacent(parts: Sequence[ir.TensorProtocol]) -> bool:
    files = [part for part in parts if isinstance(part, ir.ExternalTensor)]
    return len(files) == len(parts) and all(
        one.location == next_.location and (one.offset or 0) + one.nbytes == next_.offset
        for one, next_ in pairwise(files)
    )


def _linear(node: ir.Node) -> Linear:
    _, codes, scales = node.inputs
    assert codes is not None and scales is not None
    added = only_user(node.outputs[0], "Add")
    if added is not None:
        for value in added.inputs:
            if _is_bias(value, number(node, "N")):
                assert value is not None
                return Linear(node, (codes, scales, value), added.outputs[0])
    return Linear(node, (codes, scales), node.outputs[0])


def _is_bias(value: ir.Value | None, features: int) -> bool:
    stored = value.const_value if value is not None and is_initializer(value) else None
    return stored is not None and tuple(stored.shape) == (features,)


def _replace(group: Sequence[Linear], tensors: Sequence[ir.Value], name: str) -> None:
    """One matmul and a split, where the first of the group was."""
    first = group[0].node
    graph = first.graph
    assert graph is not None
    sizes = [linear.features for linear in group]
    attributes: dict[str, int | float] = {key: number(first, key) for key in LAYOUT}
    inputs = [first.inputs[0], *tensors[:2], *((None, None, tensors[2]) if tensors[2:] else ())]
    (product,) = insert(
        first, MATMUL_NBITS, inputs, attributes | {"N": sum(sizes)}, [f"{name}.product"]
    )
    split = constant(graph, f"sizes_{'_'.join(map(str, sizes))}", np.asarray(sizes, np.int64))
    outputs = [f"{name}.{place}" for place in range(len(group))]
    parts = insert(first, "Split", [product, split], {"axis": -1}, outputs, domain="")
    for linear, part in zip(group, parts, strict=True):
        take_place(graph, linear.result, part)
        for node in dict.fromkeys([linear.result.producer(), linear.node]):
            assert node is not None
            graph.remove(node, safe=True)


def _joined_name(fqns: Sequence[str]) -> str:
    """`a.q_proj.weight`, `a.k_proj.weight` -> `a.q_proj+k_proj.weight`"""
    paths = [fqn.split(".") for fqn in fqns]
    if len({len(path) for path in paths}) > 1:
        return "+".join(fqns)
    return ".".join("+".join(dict.fromkeys(parts)) for parts in zip(*paths, strict=True))
