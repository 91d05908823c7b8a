"""An attention, the turning of its inputs and its cache are one operator on one buffer.

    Attention(rotary(q), rotary(k), v, mask, past_k, past_v)
    ->  GroupQueryAttention(q k v, past_k, past_v, lengths, cosines, sines)

Attention of the standard returns a cache that is one position longer: a copy of all of it, each
token. GroupQueryAttention writes into the cache that it reads, if both are the same memory, whose
length is then the most that fits; `seqlens_k` and `total_sequence_length` say how much is in it.
It has no mask, so prompts must not be padded on the left, and the mask of the graph is tried: it
has to be the causal one at every length up to the most.

It turns queries and keys itself, by the count of positions and tables of the graph's own cosines
and sines. So positions must be counted: those of rows and columns (M-RoPE) have no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from gracec.backends.onnx.fused import LENGTHS, TOTAL_LENGTH
from gracec.backends.onnx.fused.nodes import constant, insert, number, take_place
from gracec.capture.serving_graph import CACHE
from gracec.errors import GracecError

GROUP_QUERY_ATTENTION = "GroupQueryAttention"
ATTENTION, ROTARY = "Attention", "RotaryEmbedding"
PARTIAL = ("interleaved", "rotary_embedding_dim")
CAPACITY = "max_sequence_length"
MOST_POSITIONS = 1 << 15
"""Of a table, whatever the model was made for: more would be tens of MiB."""

Compute = Callable[[Sequence[str], int, int], Sequence[np.ndarray]]
"""(names of values, P, S) -> what they are for S tokens of one prompt after a cache of P."""


def fuse_attentions(graph: ir.Graph, compute: Compute, positions: int) -> int:
    """Fuse all attentions in place; how many there are.

    Args:
        compute: runs the graph as it was.
        positions: the most that a cache may hold.

    Raises:
        GracecError: if one cannot be fused: a cache cannot be of both forms.
    """
    attentions = [node for node in graph if node.op_type == ATTENTION and len(node.inputs) == 6]
    cached = [value for value in graph.inputs if str(value.name).startswith(f"{CACHE}.")]
    if not cached or 2 * len(attentions) != len(cached):
        raise GracecError(
            f"{len(attentions)} of {len(cached) // 2} attentions are one operator with their cache"
        )
    lengths, total = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
        for name, shape in ((LENGTHS, ("batch_size",)), (TOTAL_LENGTH, ()))
    )
    graph.inputs.extend([lengths, total])
    for mask in dict.fromkeys(str(_given(node, 3).name) for node in attentions):
        _check_causal(mask, compute, positions)
    tables: dict[str, ir.Value] = {}
    for node in attentions:
        query, key, value = (_given(node, place) for place in range(3))
        further: list[ir.Value] = []
        turned = _turned(query, key)
        if turned is not None:
            query, key, *angles = turned
            for angle in angles:
                name = str(angle.name)
                if name not in tables:
                    (table,) = compute([name], 0, positions)
                    tables[name] = constant(graph, f"{name}_table", table[0])
                further.append(tables[name])
        _replace(node, (query, key, value), (lengths, total), further)
    for value in [*cached, *graph.outputs]:
        if value.shape is not None and len(value.shape) == 4:
            batch, heads, _, size = value.shape
            value.shape = ir.Shape((batch, heads, CAPACITY, size))
    return len(attentions)


def _replace(
    node: ir.Node,
    projections: tuple[ir.Value, ir.Value, ir.Value],
    lengths: tuple[ir.Value, ir.Value],
    tables: Sequence[ir.Value],
) -> None:
    graph = node.graph
    assert graph is not None
    attributes: dict[str, int | float] = {
        "num_heads": number(node, "q_num_heads"),
        "kv_num_heads": number(node, "kv_num_heads"),
        "scale": node.attributes["scale"].as_float(),
        "do_rotary": int(bool(tables)),
    }
    packed = _packed(projections)
    inputs = [packed, None, None] if packed is not None else list(projections)
    past = [_given(node, 4), _given(node, 5)]
    names = [str(output.name) for output in node.outputs]
    found = insert(
        node, GROUP_QUERY_ATTENTION, [*inputs, *past, *lengths, *tables], attributes, names
    )
    for old, new in zip(node.outputs, found, strict=True):
        take_place(graph, old, new)
    graph.remove(node, safe=True)


def _given(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None or node.attributes["softcap"].as_float():
        raise GracecError("an attention of another form", where=str(node.outputs[0].name))
    return value


def _turned(query: ir.Value, key: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None:
    """What was turned, cosines and sines; None if neither was.

    Raises:
        GracecError: if they were not turned alike, or not as a whole.
    """
    found = [_rotary(query), _rotary(key)]
    if found == [None, None]:
        return None
    first, second = found
    if first is None or second is None or first.inputs[1:] != second.inputs[1:]:
        raise GracecError("query and key are not turned alike", where=str(query.name))
    if any(number(one, name) for one in (first, second) for name in PARTIAL):
        raise GracecError("only a part of each head is turned", where=str(query.name))
    x, cosines, sines = first.inputs[:3]
    y = second.inputs[0]
    assert x is not None and y is not None and cosines is not None and sines is not None
    return x, y, cosines, sines


def _rotary(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == ROTARY else None


def _packed(projections: Sequence[ir.Value]) -> ir.Value | None:
    """Queries, keys and values side by side, if they are the parts of one value, in order."""
    split = projections[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(projections):
        return None
    return split.inputs[0]


def _check_causal(mask: str, compute: Compute, positions: int) -> None:
    """Each position sees itself and all before it, and nothing else."""
    for past, length in ((0, 8), (3, 5), (positions - 1, 1)):
        (found,) = compute([mask], past, length)
        expected = np.tri(length, past + length, past, dtype=bool)
        if not (found == expected).all():
            raise GracecError("the attention is not to all positions before", where=mask)
