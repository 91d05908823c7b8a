"""A program that is trained or teaches, and its scores on data that is not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.objective import Outputs
from gracec.passes.insert_taps import HIDDEN
from gracec.passes.select_supervised import INDEX
from gracec.training.micro_batch import Batch, MicroBatch


@dataclass(frozen=True)
class Learner:
    """A program that is trained or teaches, and the model whose inputs it takes.

    Attributes:
        program: with logits at `supervised_index` and, where L_RCKA is on, `hidden`.
        model: that it was captured from.
    """

    program: Program
    model: PreTrainedModel

    def inputs(self, micro: MicroBatch) -> dict[str, Tensor]:
        """What the program takes, in order, in the dtype and on the device of the model."""
        found = family_of(self.model).cast(self.model, micro.inputs)
        values = {**found, INDEX: micro.index}
        return {name: values[name].to(self.model.device) for name in self.program.example_inputs}

    def outputs(self, values: Tensor | Sequence[Tensor]) -> Outputs:
        """What the program returned, by name."""
        values = [values] if isinstance(values, Tensor) else values
        named = dict(zip(self.program.output_names, values, strict=True))
        return Outputs(named["logits"], named.get(HIDDEN))


@dataclass(frozen=True)
class HeldOut:
    """Scores on data that is not trained on.

    Attributes:
        loss: cross-entropy for each answer token, in nats.
        exact: share of samples whose every answer token is the likeliest one.
    """

    loss: float
    exact: float


@torch.no_grad()
def score(student: Learner, batches: Iterable[Batch]) -> HeldOut:
    """Loss and exact matches on batches with labels.

    Raises:
        GracecError: if there is none.
    """
    total, tokens, exact, samples = 0.0, 0, 0, 0
    for batch in batches:
        micro = MicroBatch.read(student.model, batch)
        outputs = student.outputs(student.program(**student.inputs(micro)))
        assert isinstance(outputs.logits, Tensor)
        logits, labels = outputs.logits.float().cpu(), micro.labels.cpu()
        total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += len(labels)
        wrong = torch.zeros(micro.shape[0], dtype=torch.int64)
        wrong.index_add_(0, micro.rows.cpu(), (logits.argmax(-1) != labels).long())
        exact += int((wrong == 0).sum())
        samples += len(wrong)
    if not tokens:
        raise GracecError("no sample of the held-out data can be used", fix="mend the data")
    return HeldOut(total / tokens, exact / samples)
