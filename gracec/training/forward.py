"""A student's graph and its loss as one module, which DDP wraps.

Where logits are computed in chunks the loss reads a parameter itself, the head, which has to happen
inside what is wrapped. In shards it is the graph that is wrapped, and it keeps its head gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gracec.objective import GraceObjective, Outputs
from gracec.training.learner import Learner
from gracec.training.micro_batch import MicroBatch


class Forward(nn.Module):
    """The loss of a micro-batch.

    Args:
        student: whose graph runs.
        graph: what runs it: the module of its program, or that compiled.
        narrow: whether matmuls compute in bfloat16.
    """

    def __init__(
        self, student: Learner, graph: Any, objective: GraceObjective, *, narrow: bool
    ) -> None:
        super().__init__()
        self.student, self.objective, self.narrow = student, objective, narrow
        self.graph = graph

    def forward(
        self,
        micro: MicroBatch,
        taught: Outputs | None,
        normalisers: Tensor,
        beta: float,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """The loss, a scalar with a graph, and the totals of its terms; arguments as those of
        `GraceObjective.terms` and `GraceObjective.loss`."""
        values = self.student.inputs(micro)
        with torch.autocast(self.student.model.device.type, torch.bfloat16, self.narrow):
            outputs = self.student.outputs(self.graph(**values))
        terms = self.objective.terms(outputs, taught, micro.targets)
        return self.objective.loss(terms, normalisers, beta, step), terms.totals
