"""Exact match of a model on packed questions."""

import numpy as np
import torch
from torch import Tensor, nn

from . import losses
from .models import pixels
from .packing import layout, questions_of

BATCH = 50


@torch.no_grad()
def exact_match(
    model: nn.Module, split: str, data: dict[str, np.ndarray], blind: bool = False
) -> tuple[Tensor, float]:
    """(bool [N, questions], share of emoji that the image side recognises) on `packing.arrays`.

    Blind: the image is replaced by zeros after normalisation.
    """
    device = next(model.parameters()).device
    form = layout(questions_of(split, 0)).to(device)
    words = model.get_input_embeddings().weight
    training = model.training
    model.eval()
    hits, seen = [], []
    for rows in np.split(np.arange(len(data["cells"])), range(BATCH, len(data["cells"]), BATCH)):
        images, cells, tokens, expected = (
            torch.from_numpy(np.asarray(data[field][rows])).to(device)
            for field in ("images", "cells", "tokens", "expected")
        )
        visual = losses.visual_tokens(model, pixels(images) * (not blind))
        seen.append(losses.alignment(visual, words, cells.long())[1])
        logits = losses.answer_logits(model, visual, tokens.long(), form)
        hits.append(losses.correct(logits, losses.answer_targets(expected.long(), form), form))
    model.train(training)
    return torch.cat(hits).cpu(), torch.stack(seen).mean().item()
