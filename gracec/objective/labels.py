"""Which logits predict which token: the next-token shift, and the positions that are supervised.

Logits at position t predict token t + 1. The objective takes either of two forms.

    logits [B, T, V] with labels [B, T]    labels as Hugging Face has them, labels[b, t] being token
                                           t or `ignore_index`: the shift is done here
    logits [S, V] with labels [S]          already aligned, labels[i] is the target of logits[i]

The second form is what a graph gives whose head sees the supervised positions only;
`supervised_positions` makes the index and the labels of both from labels [B, T].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gracec.errors import GracecError

IGNORE_INDEX = -100


def next_token_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """int64 [B, T] -> int64 [B, T]: the label of the next token, `ignore_index` at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def supervised_positions(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Where the head has to look, and what it should find there.

    Meant for a collator: the number of results depends on the data, so that a device has to wait.

    Args:
        labels: int64 [B, T], labels[b, t] being token t or `ignore_index`.

    Returns:
        The flat positions b * T + t whose next token is a target, int64 [S], and these targets,
        int64 [S].

    Raises:
        GracecError: if the labels are not [B, T].
    """
    if labels.dim() != 2:
        raise GracecError(f"labels are [B, T], these are {list(labels.shape)}", where="labels")
    targets = next_token_labels(labels, ignore_index).flatten()
    index = (targets != ignore_index).nonzero().squeeze(1)
    return index, targets[index]


def aligned(x: Tensor, labels: Tensor, ignore_index: int, where: str) -> tuple[Tensor, Tensor]:
    """Both forms as one: `x` [P, ·] (logits or hidden states) and targets int64 [P].

    Raises:
        GracecError: if `x` and the labels are of neither form.
    """
    if x.dim() not in (2, 3):
        raise GracecError(f"expected [S, ·] or [B, T, ·], got {list(x.shape)}", where=where)
    if labels.shape != x.shape[:-1]:
        raise GracecError(
            f"{list(x.shape)} does not go with labels {list(labels.shape)}",
            where=where,
            fix=f"labels of these positions are {list(x.shape[:-1])}",
        )
    if labels.dtype != torch.int64:
        raise GracecError(f"labels are int64, these are {labels.dtype}", where="labels")
    if x.dim() == 2:
        return x, labels
    return x.flatten(0, 1), next_token_labels(labels, ignore_index).flatten()
