"""A learner: what its program is given, and its scores against the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gracec.capture import capture
from gracec.objective import LazyLogits
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.select_supervised import INDEX
from gracec.training.learner import HeldOut, Learner, score
from gracec.training.micro_batch import MicroBatch
from tests.data.collators import ONE, TWO, collator
from tests.tiny import IMAGE, tiny_llava


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    collate = collator()
    return [collate([ONE, TWO]), collate([ONE])]


@pytest.fixture(scope="module")
def learner(llava: LlavaForConditionalGeneration) -> Learner:
    passes = parse_pipeline("analyze-modality,select-supervised,return-head")
    return Learner(run_passes(capture(llava), passes).program, llava)


def test_inputs_are_those_of_the_program_in_order(
    learner: Learner, batches: list[dict[str, Tensor]]
) -> None:
    micro = MicroBatch.read(learner.model, batches[0])
    found = learner.inputs(micro)
    assert list(found) == list(learner.program.example_inputs)
    assert torch.equal(found[INDEX], micro.index)
    assert all(tensor.device == learner.model.device for tensor in found.values())


def test_under_autocast_the_head_takes_what_a_linear_would(
    learner: Learner, batches: list[dict[str, Tensor]]
) -> None:
    values = learner.program(**learner.inputs(MicroBatch.read(learner.model, batches[0])))
    for narrow, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, narrow):
            logits = learner.outputs(values).logits
        assert isinstance(logits, LazyLogits) and logits.hidden.dtype == dtype


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


def test_the_distance_from_a_teacher_is_over_every_token_of_text(
    learner: Learner, batches: list[dict[str, Tensor]]
) -> None:
    other = tiny_llava(seed=3)
    passes = parse_pipeline("analyze-modality,select-supervised,return-head")
    teacher = Learner(run_passes(capture(other), passes).program, other)
    kl, same = [], []
    for batch in batches:
        inputs = {name: batch[name] for name in batch if name != "labels"}
        with torch.no_grad():
            found, taught = (model(**inputs).logits for model in (learner.model, other))  # type: ignore[operator]
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        counts = mask[:, 1:] & (ids[:, 1:] != IMAGE)  # what is to be said next
        p, q = (one[:, :-1][counts].double().log_softmax(-1) for one in (taught, found))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    scored = score(learner, batches, teacher, everywhere=True)
    assert scored.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5)
    assert scored.top1 == torch.cat(same).double().mean().item()
    assert list(scored.row()) == ["held_out_loss", "held_out_kl", "held_out_top1"]
    itself = score(learner, batches, learner, everywhere=True)
    assert itself.kl == 0 and itself.top1 == 1
    assert score(learner, batches).row().keys() == {"held_out_loss", "held_out_exact"}


def test_a_figure_that_is_not_finite_is_none() -> None:
    assert HeldOut(float("nan"), 0.5).row() == {"held_out_loss": None, "held_out_exact": 0.5}
    found = HeldOut(1.0, 0.5, float("inf"), 0.25).row()
    assert found == {"held_out_loss": 1.0, "held_out_kl": None, "held_out_top1": 0.25}
