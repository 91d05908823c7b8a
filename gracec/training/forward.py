"""A student's graph and its loss as one module, which DDP wraps.

Where logits are computed in chunks the loss reads a parameter itself, the head, which has to happen
inside what is wrapped. In shards it is the graph that is wrapped, and it keeps its head gathered.
"""

from __future__ import annotations

from torch import Tensor, nn

from gracec.objective import GraceObjective, Outputs
from gracec.training.learner import Learner
from gracec.training.micro_batch import MicroBatch


class Forward(nn.Module):
    """The loss of a micro-batch.

    Args:
        student: whose graph runs.
        objective: of the loss.
    """

    def __init__(self, student: Learner, objective: GraceObjective) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        # What is wrapped has to see its parameters.
        self.graph = student.program.graph_module if student.graph is None else student.graph

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
        terms = self.objective.terms(self.student(micro), taught, micro.targets)
        return self.objective.loss(terms, normalisers, beta, step), terms.totals
