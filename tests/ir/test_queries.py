"""Roles that are proved: what becomes of a value says what it is for, not the op that makes it."""

import torch
from torch import Tensor, fx, nn

from gracec.capture.module import capture_module
from gracec.ir.program import Program
from gracec.ir.queries import attends, chooses_experts, weight_of

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Written out; `values` keeps only what is multiplied before the softmax."""

    def __init__(self, values: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).transpose(1, 2) / 4).softmax(-1)
        return torch.dropout(scores, 0.1, False) @ self.v(x) if self.values else scores


class Gated(nn.Module):
    """A softmax of a linear, whose result weighs two others: no attention, and no choice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.two = nn.Linear(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return weights[..., :1] * self.one(x) + weights[..., 1:] * self.two(x)


class Mixed(nn.Module):
    """A softmax of a linear that is multiplied with an activation: a mixture of experts whose
    answers are all computed, which a softmax and a matmul alone would take for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), nn.Linear(16, 4 * 16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        chosen = logits.topk(2, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values).softmax(-1)
        answers = self.experts(x).unflatten(-1, (4, 16))
        found: Tensor = self.head((weights.unsqueeze(-2) @ answers).squeeze(-2))
        return found


class Best(nn.Module):
    """The three largest logits of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x).topk(3, dim=-1).values
        return found


def captured(net: nn.Module) -> Program:
    return capture_module(net.eval(), {"x": X})


def softmax(program: Program) -> fx.Node:
    (found,) = [node for node in program.graph.nodes if "softmax" in str(node.target)]
    return found


def routers(program: Program) -> list[str]:
    weights = [weight_of(node) for node in chooses_experts(program.graph)]
    return [program.fqn(str(weight.target)) for weight in weights if weight is not None]


def test_attention_multiplies_before_and_after_its_softmax() -> None:
    assert attends(softmax(captured(Attention())))
    assert not attends(softmax(captured(Attention(values=False))))
    assert not attends(softmax(captured(Gated())))
    assert not attends(softmax(captured(Mixed())))


def test_a_router_is_what_a_choice_is_made_by() -> None:
    assert routers(captured(Mixed())) == ["gate.weight"]
    assert routers(captured(Gated())) == []
    assert routers(captured(Best())) == []
    assert routers(captured(Attention())) == []
