"""A teacher of the same tokenizer whose vocabulary is padded otherwise: what is learnt from it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.normalizers import Lowercase
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, PreTrainedModel

import gracec
from gracec.capture import capture
from gracec.errors import GracecError
from gracec.objective import GraceObjective, LazyLogits, Outputs, Targets
from gracec.passes import parse_pipeline, run_passes
from gracec.training.learner import Learner, score
from gracec.training.teacher import check_tokenizers, taught_ids
from tests.data.collators import ONE, TWO, collator
from tests.tiny import VOCAB_SIZE, tiny_image, tiny_llava, tiny_processor
from tests.tiny_families import CONFIGS
from tests.tiny_families import tiny_processor as processor_of

STUDENT_ROWS, TEACHER_ROWS = VOCAB_SIZE + 3, VOCAB_SIZE + 9
IDS, LABELS = 6, torch.tensor([2, 5, -100, 0])


def qwen2_vl(rows: int, seed: int, width: int = 64) -> PreTrainedModel:
    """A tiny Qwen2-VL with so many logits; its tokenizer has `VOCAB_SIZE` ids."""
    config: Any = CONFIGS["qwen2_vl"]()
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, vision.hidden_size = rows, width, width
    text.num_attention_heads = width // 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    module: torch.nn.Module = model
    module.eval()
    return model


def expected(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """L_CE over all that the student says, and L_GDKD over the first IDS classes, in float64."""
    total, weight = student.new_zeros(()), student.new_zeros(())
    for s, t, y in zip(student[:, :IDS], teacher[:, :IDS], LABELS.tolist(), strict=True):
        if y < 0:
            continue
        rest = [j for j in range(IDS) if j != y]
        p, q = (t / 2).softmax(0), (s / 2).softmax(0)
        target = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        p_rest, q_rest = (one[rest] / one[rest].sum() for one in (p, q))
        others = (p_rest * (p_rest / q_rest).log()).sum()
        certain = t.softmax(0)
        gate = ((certain * certain.log()).sum() / math.log(IDS)).exp()
        total, weight = total + gate * 4 * (target + 4 * others), weight + gate
    return cross_entropy(student, LABELS) + beta * total / weight


def loss(objective: GraceObjective, student: Any, teacher: Any) -> Tensor:
    targets = Targets(LABELS)
    normalisers = objective.normalisers(Outputs(teacher), targets)
    terms = objective.terms(Outputs(student), Outputs(teacher), targets)
    torch.testing.assert_close(terms.weights.double(), normalisers.double())
    return objective.loss(terms, normalisers, beta=0.7, step=0)


@pytest.mark.parametrize("lazy", [False, True])
def test_loss_and_gradients_are_those_of_the_ids_that_both_have(lazy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, taught, taught_head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 3), (IDS + 2, 3), (4, 5), (IDS + 5, 5))
    )
    hidden.requires_grad_(), head.requires_grad_()
    objective = GraceObjective(omega=0, chunk_size=3, vocabulary=IDS)
    if lazy:
        found = loss(objective, LazyLogits(hidden, head), LazyLogits(taught, taught_head))
    else:
        found = loss(objective, hidden @ head.T, taught @ taught_head.T)
    reference = expected(hidden @ head.T, taught @ taught_head.T, beta=0.7)
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(
        torch.autograd.grad(found, (hidden, head)), torch.autograd.grad(reference, (hidden, head))
    )


@pytest.mark.parametrize("kind", ["gdkd", "kl"])
@pytest.mark.parametrize("value", [1e4, -1e30, math.inf, math.nan])
def test_rows_beyond_may_hold_anything(kind: Any, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, IDS + more, generator=generator) for more in (2, 5))
    objective = GraceObjective(ce=0, omega=0, distillation=kind, vocabulary=IDS)
    found = []
    for padding in (0.0, value):
        student[:, IDS:] = teacher[:, IDS:] = padding
        given = student.clone().requires_grad_()
        one = loss(objective, given, teacher)
        found.append((one, *torch.autograd.grad(one, given)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1][:, :IDS].any() and not found[0][1][:, IDS:].any()


def test_scores_ignore_them_as_well() -> None:
    collate = collator()
    batches = [collate([ONE, TWO])]
    passes, learners, found = (
        parse_pipeline("analyze-modality,select-supervised,return-head"),
        [],
        [],
    )
    for seed, rows in ((0, VOCAB_SIZE + 3), (1, VOCAB_SIZE + 9)):
        model = tiny_llava(seed, vocab_size=rows, num_hidden_layers=1)
        program = run_passes(capture(model), passes).program
        learners.append(Learner(program, model, VOCAB_SIZE))
    for factor in (0.0, 1e4):
        for learner in learners:
            head = learner.model.lm_head.weight.data  # which the program reads
            head[VOCAB_SIZE:] = factor * head[:1]
        found.append(score(learners[0], batches, learners[1]))
    assert found[0].kl and (found[0].kl, found[0].top1) == (found[1].kl, found[1].top1)
    assert found[0].loss != found[1].loss  # the student generates from all of its rows


def test_the_ids_are_those_of_the_tokenizer() -> None:
    def model(rows: int) -> Any:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=rows))
        return SimpleNamespace(config=config)

    def processor(*ids: int) -> Any:
        vocabulary = {str(number): number for number in ids}
        return SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary))

    assert taught_ids(model(8), model(8), processor(0, 1)) is None
    assert taught_ids(model(8), model(10), processor(0, 1, 5)) == 6  # with a hole
    assert taught_ids(model(10), model(8), processor(0, 7)) == 8
    assert taught_ids(model(8), model(10), processor(0, 9)) == 8  # no row of the student's own
    assert taught_ids(model(8), model(10), None) == 8
    with pytest.raises(GracecError, match="teacher: it has 8 rows for a vocabulary of 9 ids"):
        taught_ids(model(10), model(8), processor(8))


def test_a_student_learns_from_a_teacher_that_pads_otherwise(tmp_path: Path) -> None:
    student = qwen2_vl(STUDENT_ROWS, seed=0)
    qwen2_vl(TEACHER_ROWS, seed=7, width=96).save_pretrained(tmp_path)
    processor_of("qwen2_vl").save_pretrained(tmp_path)
    records = [
        {"image": tiny_image(number), "question": "what is it?", "answer": word}
        for number, word in enumerate(("red", "green", "blue", "gray") * 2)
    ]
    training = {"steps": 3, "batch_size": 4, "held_out": 0.25, "lr": 3e-3}
    recipe = {"name": "test", "weights": {"decoder": {"group_size": 32}}, "training": training}
    compiled = gracec.compile(
        student,
        gracec.Recipe.from_dict(recipe),
        teacher=tmp_path,
        train_data=records,
        processor=processor_of("qwen2_vl"),
        progress=False,
    )
    said = "distilled over the 128 ids of the tokenizer; 3 rows of the student and 9 of the teacher"
    assert any(said in note.text for note in compiled.report.notes)
    rows = compiled.report.training["rows"]
    assert len(rows) == 3 and all(row["distillation"] > 0 and row["rcka"] > 0 for row in rows)


def test_tokenizers_must_agree() -> None:
    check_tokenizers(tiny_processor(), tiny_processor())
    other = tiny_processor()
    other.tokenizer.add_tokens(["w999"])
    with pytest.raises(GracecError, match="different tokenizers: 'w999' differs"):
        check_tokenizers(tiny_processor(), other)


def test_tokenizers_that_cut_a_text_otherwise_are_refused() -> None:
    """The same tokens; only one of the two makes capitals small first."""
    other = processor_of("qwen2_vl")
    other.tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(GracecError, match='different tokenizers: they cut "In 1984'):
        check_tokenizers(processor_of("qwen2_vl"), other)
