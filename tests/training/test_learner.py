"""A learner: what its program is given, and its scores against the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gracec.capture import capture
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.select_supervised import INDEX
from gracec.training.learner import Learner, score
from gracec.training.micro_batch import MicroBatch
from tests.data.collators import ONE, TWO, collator


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    collate = collator()
    return [collate([ONE, TWO]), collate([ONE])]


@pytest.fixture(scope="module")
def learner(llava: LlavaForConditionalGeneration) -> Learner:
    passes = parse_pipeline("analyze-modality,select-supervised")
    return Learner(run_passes(capture(llava), passes).program, llava)


def test_inputs_are_those_of_the_program_in_order(
    learner: Learner, batches: list[dict[str, Tensor]]
) -> None:
    micro = MicroBatch.read(learner.model, batches[0])
    found = learner.inputs(micro)
    assert list(found) == list(learner.program.example_inputs)
    assert torch.equal(found[INDEX], micro.index)
    assert all(tensor.device == learner.model.device for tensor in found.values())


def test_scores_are_those_of_the_eager_model(
    learner: Learner, batches: list[dict[str, Tensor]]
) -> None:
    model: Any = learner.model
    logits, labels, exact = [], [], []
    for batch in batches:
        with torch.no_grad():
            found = model(**{name: batch[name] for name in batch if name != "labels"}).logits
        for row, wanted in zip(found[:, :-1], batch["labels"][:, 1:], strict=True):
            seen = wanted != -100
            logits.append(row[seen])
            labels.append(wanted[seen])
            exact.append(bool((row[seen].argmax(-1) == wanted[seen]).all()))
    loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()
    scored = score(learner, batches)
    assert scored.loss == pytest.approx(loss, rel=1e-5)
    assert scored.exact == sum(exact) / len(exact)
