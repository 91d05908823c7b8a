"""Codes of a post-training quantization as a state of a graph that is trained.

    weight := s q        w_scale := the parameter of |s|        w_scale_sign := the signs of s

A product of a scale on its grid (8 significant bits) and a code (at most 8) is exact in float32, as
is its quotient by that scale, so that freezing gives the same codes and scales again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from gracec import quant
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.ir.queries import seen_through
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE
from gracec.quant.frozen import FrozenWeight


class _Place(NamedTuple):
    """The tensors of a fake-quantized weight, as the program holds them."""

    fqn: str
    weight: Tensor
    scale_param: Tensor
    scale_signs: Tensor | None
    parametrization: str
    scale_grid: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        signs = () if self.scale_signs is None else (self.scale_signs,)
        return (self.weight, self.scale_param, *signs)


def tensors_of(program: Program, weights: Mapping[str, FrozenWeight]) -> list[Tensor]:
    """What `write_codes` writes into."""
    return [tensor for place in _places(program, weights) for tensor in place.tensors]


@torch.no_grad()
def write_codes(program: Program, weights: Mapping[str, FrozenWeight]) -> None:
    """Let fake-quantized weights of a float32 program stand for these codes, in place.

    Args:
        weights: FQN -> codes and scales; other weights are left as they are.

    Raises:
        GracecError: if the program has no such weight, or cannot stand for the codes exactly.
    """
    for place in _places(program, weights):
        weight = weights[place.fqn]
        scales, signs = weight.scales.to(place.scale_param.device), None
        place.weight.copy_(weight.dequantize())
        place.scale_param.copy_(quant.scale_to_param(scales, place.parametrization))
        if place.scale_signs is not None:
            signs = place.scale_signs.copy_(quant.scale_signs(scales))
        found = quant.scale_from_param(
            place.scale_param, place.parametrization, place.scale_grid, signs
        )
        if place.weight.dtype != torch.float32 or not torch.equal(found, scales):
            what = "scales that are not on the grid of the graph, or of another sign"
            if place.weight.dtype != torch.float32:
                what = f"products that {place.weight.dtype} does not hold"
            raise GracecError(f"the candidate has {what}", where=place.fqn)


def _places(program: Program, weights: Mapping[str, FrozenWeight]) -> Iterator[_Place]:
    """The places of these weights, each once."""
    left = dict(weights)
    for node in program.nodes(FAKE_QUANTIZE):
        operand, param, _, _, parametrization, scale_grid, _, *rest = node.args
        assert isinstance(operand, fx.Node) and isinstance(param, fx.Node)
        (sign,) = rest or [None]
        target = str(seen_through(operand).target)
        if left.pop(program.fqn(target), None) is not None:
            yield _Place(
                program.fqn(target),
                program.tensor(target),
                program.tensor(str(param.target)),
                program.tensor(str(sign.target)) if isinstance(sign, fx.Node) else None,
                str(parametrization),
                str(scale_grid),
            )
    if left:
        raise GracecError(f"the candidate has {next(iter(left))}, which is not fake-quantized")
