"""An attention and the growth of its cache are one operator on projections.

attention(heads(q), repeat(cat(past_k, heads(k))), repeat(cat(past_v, heads(v))), mask), merged
->  attention(q, k, v, past_k, past_v, mask), which returns the caches as well
"""

from __future__ import annotations

from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from gracec.ir.program import Program
from gracec.passes.fusions.nodes import RESHAPES, metadata, operand_of, projection_of
from gracec.passes.rewrite import Mismatch, Rewrite, described

aten = torch.ops.aten
ATTENTION = torch.ops.gracec.attention.default
SDPA = aten.scaled_dot_product_attention.default


class Cache(NamedTuple):
    """grown [B, KV, P + S, D] = cat(past [B, KV, P, D], new), a projection [B, S, KV * D] of it."""

    grown: fx.Node
    past: fx.Node
    new: fx.Node


class Attention(NamedTuple):
    """The operands of an attention with a cache, and what its heads are merged to [B, S, N * D]."""

    query: fx.Node
    keys: Cache
    values: Cache
    mask: fx.Node
    scale: float
    heads: int
    merged: fx.Node


def _is_attention(node: fx.Node) -> bool:
    return node.target == SDPA


def _match_attention(node: fx.Node) -> Attention:
    names = (argument.name for argument in SDPA._schema.arguments)
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    mask, heads = given.get("attn_mask"), given["query"]
    if given.get("dropout_p"):
        raise Mismatch(f"a share of {given['dropout_p']} is dropped")
    if given.get("is_causal"):
        raise Mismatch("it is causal by a flag, not by a mask")
    if not isinstance(mask, fx.Node):
        raise Mismatch("the mask is missing")
    query, merged = projection_of(heads), _merged(node)
    if query is None:
        raise Mismatch(f"the query is no projection seen as heads, but {described(heads)}")
    keys, values = _cache(given["key"], "keys"), _cache(given["value"], "values")
    _, count, _, size = heads.meta["val"].shape
    other = values.grown.meta["val"].shape[3]
    if other != size:
        raise Mismatch(f"the heads of the keys have {size} features, those of the values {other}")
    if merged is None:
        raise Mismatch("the heads are not merged after it")
    scale = given.get("scale")
    scale = size**-0.5 if scale is None else scale
    return Attention(query, keys, values, mask, scale, count, merged)


def _fuse_attention(program: Program, node: fx.Node, found: Attention) -> None:
    graph, caches = program.graph, (found.keys, found.values)
    new, past = (cache.new for cache in caches), (cache.past for cache in caches)
    kv_heads = found.keys.past.meta["val"].shape[1]
    numbers = (found.scale, found.heads, kv_heads)
    with graph.inserting_before(node):
        fused = graph.call_function(ATTENTION, (found.query, *new, *past, found.mask, *numbers))
        results = [graph.call_function(getitem, (fused, number)) for number in range(3)]
    for result, old in zip(results, (found.merged, *(c.grown for c in caches)), strict=True):
        result.meta = metadata(old, node)
    found.merged.replace_all_uses_with(results[0])
    for result, cache in zip(results[1:], caches, strict=True):
        # What repeats its heads reads a cache as well; it comes before, and is not needed now.
        cache.grown.replace_all_uses_with(result, _is_output)
    fused.meta = metadata(node, node) | {"val": tuple(result.meta["val"] for result in results)}


def _cache(heads: fx.Node, name: str) -> Cache:
    """cat(past, new) or the same with repeated heads -> past, new"""
    grown = _unrepeated(heads)
    if grown is None or grown.target != aten.cat.default:
        raise Mismatch(f"the {name} are neither cat(past, new) nor its heads repeated")
    parts: Any = grown.args[0]
    if len(parts) != 2 or grown.args[1:] not in ((-2,), (2,)):
        raise Mismatch(f"the {name} are joined otherwise than past and new along the positions")
    past, new = parts
    projection = projection_of(new)
    if projection is None:
        raise Mismatch(f"the new {name} are no projection seen as heads, but {described(new)}")
    return Cache(grown, past, projection)


def _is_output(node: fx.Node) -> bool:
    return node.op == "output"


def _merged(attention: fx.Node) -> fx.Node | None:
    """attention [B, N, S, D] -> reshape(transpose(attention)) [B, S, N * D], if it is used so."""
    shape = attention.meta["val"].shape
    node, turned = attention, False
    while len(node.users) == 1:
        (node,) = node.users
        if node.target == aten.transpose.int and node.args[1:] == (1, 2) and not turned:
            turned = True
            continue
        if node.target not in RESHAPES:
            return None
        found = node.meta["val"].shape
        if turned:
            return node if len(found) == 3 and found[:2] == (shape[0], shape[2]) else None
        if tuple(found) != tuple(shape):
            return None
    return None


def _unrepeated(heads: fx.Node) -> fx.Node | None:
    """A cache [B, KV, T, D] whose heads may have been repeated for the queries -> the cache."""
    if heads.target == aten.cat.default:
        return heads
    expanded = operand_of(heads, aten.reshape.default)
    unsqueezed = _whole(operand_of(expanded, aten.expand.default))
    grown = _whole(operand_of(unsqueezed, aten.unsqueeze.default))
    if unsqueezed is None or grown is None or unsqueezed.args[1:] != (2,):
        return None
    _, count, _, size = grown.meta["val"].shape
    repeats, repeated = expanded.meta["val"].shape[2], heads.meta["val"].shape
    fits = len(repeated) == 4 and repeated[1] == count * repeats and repeated[3] == size
    return grown if fits else None


def _whole(node: Any) -> Any:
    """What is behind slices that take everything."""
    while node is not None and node.target == aten.slice.Tensor:
        source = node.args[0]
        if tuple(source.meta["val"].shape) != tuple(node.meta["val"].shape):
            return None
        node = source
    return node


ATTENTIONS = Rewrite("attention", _is_attention, _match_attention, _fuse_attention)
