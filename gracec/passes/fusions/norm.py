"""A norm by the root of the mean square, written out, is one operator.

w * (x * rsqrt(mean(x^2) + eps))  ->  rms_norm(x, w, eps)        x [..., H], w [H]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from gracec.ir.program import Program
from gracec.passes.fusions.nodes import operand_of, operands_in_both_orders, replace
from gracec.passes.rewrite import Mismatch, Rewrite, described

aten = torch.ops.aten
RMS_NORM = torch.ops.gracec.rms_norm.default
CASTS = (aten.to.dtype, aten.type_as.default, aten._to_copy.default)


class Norm(NamedTuple):
    """w * (x * rsqrt(mean(x^2) + eps)), with x [..., H] and w [H]."""

    x: fx.Node
    weight: fx.Node
    epsilon: float


def _is_norm(node: fx.Node) -> bool:
    return _weighted(node) is not None


def _match_norm(node: fx.Node) -> Norm:
    weighted = _weighted(node)
    assert weighted is not None
    scaled, weight = weighted
    if weight.op != "get_attr":
        raise Mismatch(f"the weight is computed by {described(weight)}")
    x, root = _scaled(scaled)
    epsilon = _root_of_mean_square(root, x)
    shape, features = list(weight.meta["val"].shape), x.meta["val"].shape[-1]
    if shape != [features]:
        raise Mismatch(f"the weight has the shape {shape}, the input has {features} features")
    return Norm(x, weight, epsilon)


def _fuse_norm(program: Program, node: fx.Node, norm: Norm) -> None:
    replace(node, RMS_NORM, norm)


def _weighted(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """scaled * w -> scaled, w: a product of what holds a root and of what parameters alone make."""
    for scaled, weight in operands_in_both_orders(node, aten.mul.Tensor):
        if _holds_root(_uncast(scaled)) and _is_constant(weight):
            return scaled, weight
    return None


def _holds_root(node: fx.Node) -> bool:
    """Whether a node is a root, or the product of one."""
    factors = node.all_input_nodes if node.target == aten.mul.Tensor else [node]
    return any(_uncast(factor).target == aten.rsqrt.default for factor in factors)


def _scaled(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """x * rsqrt(y) -> x, rsqrt(y)"""
    for x, root in operands_in_both_orders(node, aten.mul.Tensor):
        if root.target == aten.rsqrt.default:
            return x, root
    if node.target in CASTS:
        raise Mismatch(f"the scaled input is cast by {described(node)}")
    if node.target == aten.mul.Tensor:
        raise Mismatch("the root is cast")
    raise Mismatch("the weight scales the root, not the scaled input")


def _root_of_mean_square(root: fx.Node, x: fx.Node) -> float:
    """rsqrt(mean(x^2, -1) + eps) -> eps"""
    shifted = operand_of(root, aten.rsqrt.default)
    mean = operand_of(shifted, aten.add.Tensor)
    if mean is None or shifted.kwargs or not isinstance(shifted.args[1], float):
        raise Mismatch(f"the root is of {described(root.args[0])}, not of a mean plus a number")
    square = operand_of(mean, aten.mean.dim)
    if square is None:
        raise Mismatch(f"the root is of {described(mean)}, not of a mean")
    if mean.args[1:] != ([-1], True) or mean.kwargs:
        raise Mismatch(f"the mean is over {mean.args[1]}, not over the last dimension, kept")
    if square.target != aten.pow.Tensor_Scalar or square.args[1] != 2:
        raise Mismatch(f"the mean is of {described(square)}, not of squares")
    if square.args[0] is not x:
        raise Mismatch("what is squared is not what is scaled")
    epsilon: float = shifted.args[1]
    return epsilon


def _uncast(node: fx.Node) -> fx.Node:
    """What is behind casts."""
    while node.target in CASTS:
        node = node.all_input_nodes[0]
    return node


def _is_constant(node: fx.Node) -> bool:
    """Whether a node is a parameter or computed from parameters alone."""
    if node.op == "get_attr":
        return True
    return bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


NORM = Rewrite("norm", _is_norm, _match_norm, _fuse_norm)
