"""Weights that are quantized once an optimizer step, and not in every graph that runs.

    before the micro-batches    ŵ = fake_quantize(w, p)
    each micro-batch            the graph without fake-quantization runs on ŵ
    after them                  dL/dŵ, summed over micro-batches  ->  dL/dw, dL/dp

The gradient of fake-quantization is linear in the one that it is given, so that this is the same
loss and the same gradient: bit for bit with one micro-batch, and else but for the order of a sum.
Groups run along the rows of a weight: any rows of it are quantized alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracec import quant
from gracec.ir.annotations import experts_of
from gracec.ir.program import Program
from gracec.ir.queries import seen_through, value
from gracec.passes.hoist_fake_quant import hoist, quantized_weights
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE, reader
from gracec.quant.frozen import Experts
from gracec.quant.ops import fake_quantize_gradients
from gracec.quant.ops_scales import scale_codes_gradient
from gracec.training.shards import local, of_rows

MATMULS = (torch.ops.aten.linear.default,)
"""Operators that autocast rounds the weight of, whatever it is in."""


@dataclass
class QuantizedWeight:
    """A weight, its scales, and what stands for both in the graph that runs.

    Attributes:
        held: ŵ [N, K], a parameter of the graph that runs, in float32 or bfloat16, and with a
            gradient in float32. Like what follows it may be sharded, by the same rows.
        weight: the float master, as the model holds it; or codes, where scales alone learn.
        scale_param: float32, as `gracec.quant.scale_from_param` reads it.
        scale_signs: int8, of that shape; None where every scale is positive.
        bits: None for codes.
        experts: of routed experts, how the model holds the weight.
        rows: N of the whole, where these are some rows of it.
    """

    held: Tensor
    weight: Tensor
    scale_param: Tensor
    scale_signs: Tensor | None
    bits: int | None
    group_size: int
    parametrization: str
    scale_grid: str
    experts: Experts | None = None
    rows: int | None = None

    @property
    def learns(self) -> bool:
        """Whether the weight or its scales do."""
        return self.weight.requires_grad or self.scale_param.requires_grad

    @torch.no_grad()
    def refresh(self) -> None:
        """ŵ := what the weight and its scales come to."""
        held, (param, signs) = local(self.held), self._scale()
        scales = quant.scale_from_param(param, self.parametrization, self.scale_grid, signs)
        if self.bits is None:
            quant.dequantize(local(self.weight), scales, self.group_size, out=held)
        else:
            quant.fake_quantize(self._matrix(), scales, self.bits, self.group_size, out=held)

    @torch.no_grad()
    def hand_on_gradient(self) -> None:
        """Take the gradient of ŵ away and give weight and scale theirs."""
        grad, self.held.grad = self.held.grad, None
        if grad is None:
            return
        grad, (param, signs) = local(grad), self._scale()
        options = (self.group_size, self.parametrization, self.scale_grid)
        if self.bits is None:
            of_scale = scale_codes_gradient(local(self.weight), param, signs, grad, *options)
        else:
            matrix = self._matrix()
            out = grad if grad.dtype == matrix.dtype else torch.empty_like(matrix)
            of_weight, of_scale = fake_quantize_gradients(
                matrix,
                param,
                signs,
                grad,
                self.bits,
                *options,
                out=out,
                rows=self.rows,
            )
            as_given = of_weight if self.experts is None else self.experts.held(of_weight)
            _add_gradient(self.weight, as_given)
        _add_gradient(self.scale_param, of_scale)

    def _scale(self) -> tuple[Tensor, Tensor | None]:
        signs = self.scale_signs
        return local(self.scale_param), None if signs is None else local(signs)

    def _matrix(self) -> Tensor:
        weight = local(self.weight).detach()
        return weight if self.experts is None else self.experts.matrix(weight)


class QuantizedWeights:
    """All quantized weights of a student.

    ŵ has no memory at first, as nobody needs it whole where each rank is going to hold some rows.

    Attributes:
        program: the graph that runs; it computes with ŵ, and shares every other tensor.
    """

    def __init__(self, program: Program) -> None:
        """Args:
        program: with `fake_quantize` or `scale_codes` nodes, or with neither. It stays as it is.
        """
        nodes = quantized_weights(program)
        self.program = program
        if nodes:
            self.program = program.copy()
            hoist(self.program, _without_memory)
            self.program.recompile()
        self.weights: dict[str, QuantizedWeight] = {
            target: _read(program, calls[0], self.program.tensor(target))
            for target, calls in nodes.items()
        }

    def __iter__(self) -> Iterator[QuantizedWeight]:
        return iter(self.weights.values())

    def materialize(self, *, narrow: bool = False) -> None:
        """Give ŵ memory beside its weight; what is in it is for `refresh` to say.

        Args:
            narrow: hold in bfloat16 what only matmuls read that autocast computes in it: the values
                that they multiply are the same, and their gradients stay in float32.
        """
        readers: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
        for node in self.program.graph.find_nodes(op="get_attr"):
            readers.setdefault(str(node.target), []).extend((user, node) for user in node.users)
        for target, weight in self.weights.items():
            device, pairs = weight.weight.device, readers[target]
            held = torch.empty_like(weight.held, device=device)
            if narrow and all(u.target in MATMULS and u.args[1] is node for u, node in pairs):
                held = held.bfloat16()
            made = nn.Parameter(held)
            made.grad_dtype = torch.float32
            self.program.set_tensor(target, made)
            weight.held = made

    def require_gradients(self, *, at_once: bool = False) -> None:
        """Let ŵ have a gradient where its weight or its scales have one.

        Args:
            at_once: whether a gradient of codes is handed on in backward, as soon as it is there:
                that of the scales is far smaller. Not where ranks have yet to average it.
        """
        for weight in self:
            weight.held.requires_grad_(weight.learns)
            if at_once and weight.learns and weight.bits is None:
                hand_on = weight.hand_on_gradient
                weight.held.register_post_accumulate_grad_hook(lambda _, hand_on=hand_on: hand_on())

    def refresh(self) -> None:
        """Quantize all weights as they are now."""
        for weight in self:
            weight.refresh()

    def hand_on_gradients(self) -> None:
        """Turn gradients of ŵ into those of weights and scales, one weight after the other."""
        for weight in self:
            weight.hand_on_gradient()


def _without_memory(program: Program, node: fx.Node) -> Tensor:
    """The value of a node on the meta device."""
    traced = value(node)
    assert traced is not None
    return torch.empty(traced.shape, dtype=traced.dtype, device="meta")


def _read(program: Program, node: fx.Node, held: Tensor) -> QuantizedWeight:
    """What a node quantizes, and how."""
    operand, param, *rest = node.args
    assert isinstance(operand, fx.Node) and isinstance(param, fx.Node)
    assert isinstance(held, nn.Parameter)
    options: list[Any] = rest
    if node.target == FAKE_QUANTIZE:
        bits, group_size, parametrization, scale_grid, _, *signs = options
        experts = experts_of(reader(node))
    else:
        signs, bits, experts = [options[0]], None, None
        group_size, parametrization, scale_grid, _ = options[1:]
    sign = signs[0] if signs else None
    return QuantizedWeight(
        held,
        program.tensor(str(seen_through(operand).target)),
        program.tensor(str(param.target)),
        None if sign is None else program.tensor(str(sign.target)),
        bits,
        group_size,
        parametrization,
        scale_grid,
        experts,
    )


def _add_gradient(parameter: Tensor, grad: Tensor) -> None:
    """Where it learns. A weight that the graph also reads as it is has a gradient already."""
    if not parameter.requires_grad:
        return
    grad = of_rows(grad, parameter)
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
