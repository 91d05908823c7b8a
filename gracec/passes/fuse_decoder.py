"""fuse-decoder: one operator for each norm, rotary embedding and attention of a decoder.

    w * (x * rsqrt(mean(x^2) + eps))              ->  rms_norm(x, w, eps)
    x * cos + cat(-x[h:], x[:h]) * sin            ->  rotary_embedding(x, cos, sin)
    cat(past, k), cat(past, v), repeat, attention ->  attention(q, k, v, past_k, past_v, mask)

They are what opset 23 of ONNX calls RMSNormalization, RotaryEmbedding and Attention. A runtime
needs some microseconds for an operator, however small, and a token of a small decoder is hundreds
of them. Whatever does not have exactly these forms stays as it is; the notes count what is fused,
and the attentions that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from gracec.passes.base import Pass, PassResult
from gracec.passes.strip import drop_dead
from gracec.program import Program

aten = torch.ops.aten
RMS_NORM = torch.ops.gracec.rms_norm.default
ROTARY_EMBEDDING = torch.ops.gracec.rotary_embedding.default
ATTENTION = torch.ops.gracec.attention.default
SDPA = aten.scaled_dot_product_attention.default
RESHAPES = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class FuseDecoder(Pass):
    """No options."""

    name: ClassVar[str] = "fuse-decoder"
    keeps_numerics: ClassVar[bool] = False

    def apply(self, program: Program) -> PassResult:
        fusions: dict[str, Callable[[fx.Graph, fx.Node], bool]] = {
            "norms": _fuse_norm,
            "rotary embeddings": _fuse_rotary,
            "attentions": _fuse_attention,
        }
        counts = {
            name: sum(fuse(program.graph, node) for node in list(program.graph.nodes))
            for name, fuse in fusions.items()
        }
        drop_dead(program)
        left = sum(1 for _ in program.nodes(SDPA))
        notes = [f"{left} attentions stay as they are: they have another form"] if left else []
        notes.append(", ".join(f"{count} {name}" for name, count in counts.items()))
        return PassResult(program, any(counts.values()), tuple(notes))


def _fuse_norm(graph: fx.Graph, node: fx.Node) -> bool:
    for weight, scaled in _orders(node, aten.mul.Tensor):
        if weight.op != "get_attr":
            continue
        for x, root in _orders(scaled, aten.mul.Tensor):
            shifted = _operand(root, aten.rsqrt.default)
            if shifted is None or shifted.target != aten.add.Tensor:
                continue
            mean, epsilon = shifted.args
            square = _operand(mean, aten.mean.dim)
            if square is None or not isinstance(epsilon, float):
                continue
            squares = square.target == aten.pow.Tensor_Scalar and square.args == (x, 2)
            if squares and mean.args[1:] == ([-1], True):
                _replace(graph, node, RMS_NORM, (x, weight, epsilon))
                return True
    return False


def _fuse_rotary(graph: fx.Graph, node: fx.Node) -> bool:
    """x [B, N, S, D], a projection seen as heads -> the same, turned before it is seen so."""
    for straight, crossed in _orders(node, aten.add.Tensor):
        for x, cos in _orders(straight, aten.mul.Tensor):
            for halves, sin in _orders(crossed, aten.mul.Tensor):
                projection = _projection(x)
                tables = _table(cos, aten.cos.default), _table(sin, aten.sin.default)
                if projection is None or None in tables or not _is_rotated(halves, x):
                    continue
                view = x.args[0]
                heads, size = x.meta["val"].shape[1], x.meta["val"].shape[3]
                with graph.inserting_before(node):
                    parts = []
                    for table in tables:
                        assert table is not None
                        arguments = (table, 2, 0, size // 2)
                        slices = (u for u in table.users if u.target == aten.slice.Tensor)
                        half = next((u for u in slices if u.args == arguments), None)
                        if half is None:
                            half = graph.call_function(aten.slice.Tensor, arguments)
                            half.meta = {"val": table.meta["val"][..., : size // 2]}
                        parts.append(half)
                    turned = graph.call_function(ROTARY_EMBEDDING, (projection, *parts, heads))
                    turned.meta = _like(projection, node)
                    seen = graph.call_function(view.target, (turned, *view.args[1:]))
                    seen.meta = _like(view, node)
                _replace(graph, node, aten.transpose.int, (seen, 1, 2))
                return True
    return False


def _fuse_attention(graph: fx.Graph, node: fx.Node) -> bool:
    if node.target != SDPA or len(node.args) != 4 or set(node.kwargs) - {"scale", "enable_gqa"}:
        return False
    operands: Any = node.args
    query, keys, values, mask = operands
    q, merged = _projection(query), _merged(node)
    grown = [_unrepeated(keys), _unrepeated(values)]
    if q is None or merged is None or not isinstance(mask, fx.Node):
        return False
    past, new = [], []
    for cache in grown:
        if cache is None or cache.target != aten.cat.default or cache.args[1] not in (-2, 2):
            return False
        parts: Any = cache.args[0]
        if len(parts) != 2:
            return False
        projection = _projection(parts[1])
        if projection is None:
            return False
        past.append(parts[0])
        new.append(projection)
    heads, size = query.meta["val"].shape[1], query.meta["val"].shape[3]
    scale = node.kwargs.get("scale") or size**-0.5
    arguments = (q, *new, *past, mask, scale, heads, past[0].meta["val"].shape[1])
    with graph.inserting_before(node):
        fused = graph.call_function(ATTENTION, arguments)
        results = [graph.call_function(getitem, (fused, number)) for number in range(3)]
    for result, old in zip(results, (merged, *grown), strict=True):
        result.meta = _like(old, node)
    merged.replace_all_uses_with(results[0])
    for result, cache in zip(results[1:], grown, strict=True):
        # What repeats its heads reads a cache as well; it comes before, and is not needed now.
        cache.replace_all_uses_with(result, _is_output)
    fused.meta = _like(node, node) | {"val": tuple(result.meta["val"] for result in results)}
    return True


def _is_output(node: fx.Node) -> bool:
    return node.op == "output"


def _replace(graph: fx.Graph, node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        fused = graph.call_function(target, arguments)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)


def _like(shaped: fx.Node, placed: fx.Node) -> dict[str, Any]:
    """Metadata of a node that has the value of one node and the place of another."""
    return {"val": shaped.meta["val"]} | {
        key: placed.meta[key] for key in ("nn_module_stack",) if key in placed.meta
    }


def _orders(node: Any, target: Any) -> list[tuple[Any, Any]]:
    """Both orders of the operands of a commutative operator, if both are nodes."""
    if not isinstance(node, fx.Node) or node.target != target or len(node.args) != 2:
        return []
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


def _operand(node: Any, target: Any) -> Any:
    """The first operand of a node, if the node is of this operator."""
    if not isinstance(node, fx.Node) or node.target != target:
        return None
    first = node.args[0]
    return first if isinstance(first, fx.Node) else None


def _projection(heads: Any) -> fx.Node | None:
    """transpose(view(x [B, S, N * D])) [B, N, S, D] -> x"""
    view = _operand(heads, aten.transpose.int)
    if view is None or heads.args[1:] != (1, 2) or view.target not in RESHAPES:
        return None
    x = view.args[0]
    if not isinstance(x, fx.Node):
        return None
    narrow, wide = x.meta["val"].shape, view.meta["val"].shape
    fits = len(narrow) == 3 and len(wide) == 4 and narrow[:2] == wide[:2]
    return x if fits else None


def _merged(attention: fx.Node) -> fx.Node | None:
    """attention [B, N, S, D] -> reshape(transpose(attention)) [B, S, N * D], if it is used so."""
    shape = attention.meta["val"].shape
    node, turned = attention, False
    while len(node.users) == 1:
        (node,) = node.users
        found = node.meta["val"].shape
        if node.target in RESHAPES and turned and len(found) == 3:
            return node if found[:2] == (shape[0], shape[2]) else None
        if node.target == aten.transpose.int and node.args[1:] == (1, 2) and not turned:
            turned = True
        elif node.target not in RESHAPES or turned or tuple(found) != tuple(shape):
            return None
    return None


def _unrepeated(heads: Any) -> Any:
    """A cache [B, KV, T, D] whose heads may have been repeated for the queries -> the cache."""
    if heads.target == aten.cat.default:
        return heads
    node = _operand(heads, aten.reshape.default)
    node = _operand(node, aten.expand.default)
    node = _whole(node)
    unsqueezed = node
    node = _operand(node, aten.unsqueeze.default)
    if unsqueezed is None or unsqueezed.args[1:] != (2,):
        return None
    return _whole(node)


def _whole(node: Any) -> Any:
    """What is behind slices that take everything."""
    while node is not None and node.target == aten.slice.Tensor:
        source = node.args[0]
        if tuple(source.meta["val"].shape) != tuple(node.meta["val"].shape):
            return None
        node = source
    return node


def _table(node: Any, function: Any) -> fx.Node | None:
    """unsqueeze(t, 1) -> t [B, S, D], if t is the function of angles that come twice."""
    table = _operand(node, aten.unsqueeze.default)
    if table is None or node.args[1:] != (1,):
        return None
    angles = table
    while angles.target == aten.mul.Tensor and isinstance(angles.args[1], float):
        angles = angles.args[0]
    twice = _operand(angles, function)
    if twice is None or twice.target != aten.cat.default:
        return None
    parts: Any = twice.args[0]
    return table if len(parts) == 2 and parts[0] is parts[1] else None


def _is_rotated(node: Any, x: fx.Node) -> bool:
    """Whether a node is cat(-x[..., h:], x[..., :h]), where h is half the size of x."""
    if node.target != aten.cat.default or node.args[1:] not in ((-1,), (3,)):
        return False
    parts: Any = node.args[0]
    if len(parts) != 2:
        return False
    half = x.meta["val"].shape[3] // 2
    second, first = _operand(parts[0], aten.neg.default), parts[1]
    for part, start, end in ((first, 0, half), (second, half, 2 * half)):
        if part is None or part.target != aten.slice.Tensor or part.args[:2] != (x, 3):
            return False
        if part.args[2] != start or min(part.args[3], 2 * half) != end:
            return False
    return True
