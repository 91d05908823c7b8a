"""lower: a frozen model becomes one that a target runs."""

from __future__ import annotations

from dataclasses import asdict

import torch

from gracec import gates
from gracec.capture.eager import eager_logits
from gracec.errors import GateError
from gracec.frozen import Frozen, dense_twin
from gracec.journal import Agreement, Journal
from gracec.kernels.torchao import CountInt4Kernels
from gracec.targets.base import Runtime, Target


def lower(frozen: Frozen, target: Target, journal: Journal, *, strict: bool = False) -> Runtime:
    """What runs a frozen model, held to every gate of the target and to the frozen logits.

    Raises:
        GracecError: if the target cannot run it, or, if `strict`, a weight would run dense.
        GateError: if it is not numerically what it should be.
    """
    runtime, notes = target.lower(frozen, strict=strict)
    journal.extend(notes)
    journal.figures.update(target.gates(runtime, frozen))
    if frozen.reference is not None:
        _agree(runtime, frozen, target, journal)
    return runtime


def _agree(runtime: Runtime, frozen: Frozen, target: Target, journal: Journal) -> None:
    """Gate: the logits are as close to the frozen ones as those of dense weights are."""
    assert frozen.reference is not None
    batch, reference = frozen.reference.batch, frozen.reference.logits
    tail = frozen.reference.tail
    mask = tail(batch["attention_mask"])
    dense = dense_twin(frozen, frozen.dtype)
    inputs = {
        name: tensor.to(runtime.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in batch.items()
    }
    with torch.no_grad():
        found = gates.logit_agreement(reference, tail(runtime(**inputs).logits), mask)
    with CountInt4Kernels() as kernels:
        logits = tail(eager_logits(dense, batch))
    if kernels.count:
        raise GateError(f"{kernels.count} INT4 kernels ran among weights that are meant as dense")
    beside = gates.logit_agreement(reference, logits, mask)
    bound = target.agrees(runtime, found, beside, reference.dtype)
    journal.figures["logits"] = Agreement(**asdict(found), bound=bound)
    journal.figures["logits_dense"] = Agreement(**asdict(beside))
