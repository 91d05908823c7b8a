"""The GRACE objective, usable without the compiler: this package needs only torch.

    L = L_CE + β · L_GDKD + ω · L_RCKA         arXiv 2601.22709

`gdkd_loss`, `kl_loss` and `rcka_loss` are plain functions; `GraceObjective` combines them for an
optimizer step that is cut into micro-batches and ranks; a controller sets β. Logits may be given as
`LazyLogits`, hidden states and head, so that they never exist as a whole.
"""

from gracec.objective.ce import CrossEntropy, ce_term
from gracec.objective.controllers import (
    Controller,
    DualAscentController,
    EpochLagrangianController,
    FixedController,
    code_entropy,
)
from gracec.objective.gdkd import Gdkd, gdkd_loss, gdkd_term
from gracec.objective.head import (
    LazyLogits,
    Logits,
    PositionLoss,
    in_chunks,
    position_terms,
    position_weight,
)
from gracec.objective.kl import Kl, confidence_gate, kl_loss, kl_term
from gracec.objective.labels import next_token_labels, supervised_positions
from gracec.objective.objective import GraceObjective, Outputs, Targets, Terms, means
from gracec.objective.rcka import (
    Grams,
    Relations,
    cka,
    grams_of,
    image_count,
    rcka_loss,
    rcka_term,
)
from gracec.objective.term import Term

__all__ = [
    "Controller",
    "CrossEntropy",
    "DualAscentController",
    "EpochLagrangianController",
    "FixedController",
    "Gdkd",
    "GraceObjective",
    "Grams",
    "Kl",
    "LazyLogits",
    "Logits",
    "Outputs",
    "PositionLoss",
    "Relations",
    "Targets",
    "Term",
    "Terms",
    "ce_term",
    "cka",
    "code_entropy",
    "confidence_gate",
    "gdkd_loss",
    "gdkd_term",
    "grams_of",
    "image_count",
    "in_chunks",
    "kl_loss",
    "kl_term",
    "means",
    "next_token_labels",
    "position_terms",
    "position_weight",
    "rcka_loss",
    "rcka_term",
    "supervised_positions",
]
