"""The smallest graphs that a rule rewrites, or does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gracec import ir
from gracec.ir.program import Program
from gracec.module import capture_module
from gracec.passes.rewrite import Rewrite, rewrite
from gracec.passes.strip import drop_dead


class Computed(nn.Module):
    """A function of inputs and of one weight."""

    def __init__(self, compute: Callable[..., Tensor], weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

        def forward(**inputs: Tensor) -> Tensor:
            return compute(weight=self.weight, **inputs)

        # torch.export asks for the names of the inputs.
        own = inspect.signature(compute).parameters.values()
        given = [parameter for parameter in own if parameter.name != "weight"]
        setattr(forward, "__signature__", inspect.Signature(given))  # noqa: B010
        self.forward = forward


def graph_of(compute: Callable[..., Tensor], weight: Tensor, inputs: dict[str, Tensor]) -> Program:
    """The graph of a function that takes its inputs by name, and `weight`."""
    return capture_module(Computed(compute, weight), inputs)


def reasons(program: Program, rule: Rewrite[Any]) -> list[str]:
    """Why the candidates of a rule stay. Nothing is rewritten, and a second run says the same."""
    before, found = ir.format(program), []
    for copied in (program.copy(), program.copy()):
        done = rewrite(copied, [rule])
        assert not done.modified and done.counts == {rule.name: 0}
        assert ir.format(copied) == before == ir.format(program)
        found.append([kept.reason for kept in done.kept])
    assert found[0] == found[1]
    return found[0]


def fused(program: Program, rule: Rewrite[Any]) -> int:
    """How many are rewritten. The input stays as it is, the outputs are close, twice is once."""
    before, copied = ir.format(program), program.copy()
    done = rewrite(copied, [rule])
    drop_dead(copied)
    assert not done.kept and not rewrite(copied, [rule]).modified
    assert ir.format(program) == before
    inputs = program.example_inputs
    torch.testing.assert_close(copied(**inputs), program(**inputs))
    return done.counts[rule.name]
