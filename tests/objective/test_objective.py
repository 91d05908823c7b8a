import ast
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import gracec.objective
from gracec.errors import GracecError
from gracec.objective import (
    GraceObjective,
    LazyLogits,
    Outputs,
    Targets,
    Terms,
    ce_term,
    gdkd_loss,
    kl_loss,
    means,
    rcka_loss,
)
from tests.objective.reference import (
    IGNORED,
    gradients,
    random_labels,
    random_logits,
)

ROWS, LENGTH, VOCABULARY = 4, 12, 7
SIZES = [5, 4, 6, 3]
OBJECTIVE = GraceObjective(omega_warmup=0)


class Model(nn.Module):
    """Embedding, one layer, a tied head: small, and every parameter matters to every term."""

    def __init__(self, width: int, seed: int, lazy: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(random_logits(VOCABULARY, width, scale=1, seed=seed))
        self.layer = nn.Parameter(random_logits(width, width, scale=1, seed=seed + 1))
        self.lazy = lazy

    def forward(self, tokens: Tensor) -> Outputs:
        position = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None]
        hidden = torch.sin(self.table[tokens] + position) @ self.layer
        if self.lazy:
            return Outputs(LazyLogits(hidden, self.table), hidden)
        return Outputs(hidden @ self.table.T, hidden)


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels, image index [4, 12]; rows have one image and different numbers of labels."""
    tokens = random_labels(ROWS, LENGTH, vocabulary=VOCABULARY, seed=3).clamp(min=0)
    labels = tokens.clone()
    index = torch.full((ROWS, LENGTH), -1)
    for row, size in enumerate(SIZES):
        index[row, 1 : 1 + size] = row
        labels[row, : 2 * row + 2] = IGNORED
    labels[2] = IGNORED
    return tokens, labels, index


def rows(start: int, stop: int) -> tuple[Tensor, Targets]:
    """A micro-batch: tokens and targets of some rows, images numbered from 0."""
    tokens, labels, index = whole_batch()
    numbers = (index[start:stop] - start).where(index[start:stop] >= 0, -1)
    return tokens[start:stop], Targets(labels[start:stop], numbers, SIZES[start:stop])


def step(
    objective: GraceObjective, student: Model, teacher: Model, parts: list[tuple[int, int]]
) -> tuple[dict[str, float], tuple[Tensor, ...]]:
    """One optimizer step of accumulation: the terms and the gradients."""
    student.zero_grad()
    batches = [rows(*part) for part in parts]
    with torch.no_grad():
        taught = [teacher(tokens) for tokens, _ in batches]
    normalisers = torch.zeros(3)
    for t, (_, targets) in zip(taught, batches, strict=True):
        normalisers = normalisers + objective.normalisers(t, targets)
    totals = torch.zeros(3)
    for t, (tokens, targets) in zip(taught, batches, strict=True):
        terms = objective.terms(student(tokens), t, targets)
        objective.loss(terms, normalisers, beta=0.5, step=0).backward()
        totals = totals + terms.totals
    grads = tuple(p.grad.clone() for p in student.parameters() if p.grad is not None)
    return means(totals, normalisers), grads


def test_it_is_the_sum_of_its_terms() -> None:
    student, teacher = Model(5, 0), Model(6, 10)
    tokens, targets = rows(0, ROWS)
    taught, parameters = teacher(tokens), tuple(student.parameters())

    def combined() -> Tensor:
        terms = OBJECTIVE.terms(student(tokens), taught, targets)
        return OBJECTIVE.loss(terms, terms.weights, beta=0.5, step=0)

    def separate() -> Tensor:
        s = student(tokens)
        ce = ce_term(s.logits, targets.labels).mean()
        gdkd = gdkd_loss(s.logits, taught.logits, targets.labels)
        return ce + 0.5 * gdkd + 3 * rcka_loss(s.hidden, taught.hidden, targets.image_index)

    torch.testing.assert_close(combined(), separate())
    ours, theirs = (gradients(loss(), *parameters) for loss in (combined, separate))
    torch.testing.assert_close(ours, theirs)


def test_normalisers_are_known_before_the_student_runs() -> None:
    student, teacher = Model(5, 0), Model(6, 10)
    tokens, targets = rows(0, ROWS)
    taught = teacher(tokens)
    early = OBJECTIVE.normalisers(taught, targets)
    late = OBJECTIVE.terms(student(tokens), taught, targets).weights
    torch.testing.assert_close(early, late)
    counted = (targets.labels[:, 1:] != IGNORED).sum()
    assert early[0] == counted
    assert counted / math.e <= early[1] < counted
    assert early[2] == 3  # one of the four images has fewer than 4 tokens


@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(0, ROWS), max_size=3),
    distillation=st.sampled_from(["gdkd", "kl", "none"]),
    lazy=st.booleans(),
)
def test_a_step_does_not_depend_on_how_the_batch_was_cut(
    cuts: list[int], distillation: Any, lazy: bool
) -> None:
    """Values and gradients; rows differ in their number of labels, one has none."""
    objective = GraceObjective(distillation=distillation, omega_warmup=0, chunk_size=5)
    student, teacher = Model(5, 0, lazy), Model(6, 10, lazy)
    parts = [(a, b) for a, b in pairwise([0, *sorted(cuts), ROWS]) if a < b]
    values, grads = step(objective, student, teacher, parts)
    expected_values, expected_grads = step(objective, student, teacher, [(0, ROWS)])
    assert values == pytest.approx(expected_values, rel=1e-6)
    assert values["rcka"] > 0.01
    torch.testing.assert_close(grads, expected_grads, rtol=1e-6, atol=1e-9)


def test_the_mean_of_micro_batches_would_be_another_step() -> None:
    """What the normalisers are for: cut into rows, the mean of the rows' losses is not the loss."""
    student, teacher = Model(5, 0), Model(6, 10)
    parts = [step(OBJECTIVE, student, teacher, [(r, r + 1)])[0] for r in range(ROWS)]
    whole = step(OBJECTIVE, student, teacher, [(0, ROWS)])[0]
    for name in ("ce", "distillation", "rcka"):
        assert sum(p[name] for p in parts) / ROWS != pytest.approx(whole[name], rel=0.05)


def _rank(rank: int, world: int, address: str, result: str) -> None:
    """The loop of the documentation on one of several ranks; rank 0 saves gradients and means."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    teacher = Model(6, 10)
    student = DistributedDataParallel(Model(5, 0))
    batches = [rows(*part) for part in ([(0, 1), (1, 3)], [(3, 4)])[rank]]
    with torch.no_grad():
        taught = [teacher(tokens) for tokens, _ in batches]
    normalisers = torch.stack(
        [OBJECTIVE.normalisers(t, targets) for t, (_, targets) in zip(taught, batches, strict=True)]
    ).sum(0)
    dist.all_reduce(normalisers)
    totals = torch.zeros_like(normalisers)
    for number, (t, (tokens, targets)) in enumerate(zip(taught, batches, strict=True)):
        student.require_backward_grad_sync = number == len(batches) - 1
        terms = OBJECTIVE.terms(student(tokens), t, targets)
        loss = OBJECTIVE.loss(terms, normalisers, beta=0.5, step=0) * world
        loss.backward()
        totals += terms.totals
    dist.all_reduce(totals)
    if rank == 0:
        grads = [p.grad for p in student.parameters()]
        torch.save({"grads": grads, "means": means(totals, normalisers)}, result)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_unequal_batches_give_the_same_step(tmp_path: Path) -> None:
    """Two processes with DistributedDataParallel: three rows in two parts, and one row."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.spawn(
        _rank, (2, str(tmp_path / "store"), str(tmp_path / "result")), nprocs=2
    )
    found = torch.load(tmp_path / "result")
    values, grads = step(OBJECTIVE, Model(5, 0), Model(6, 10), [(0, ROWS)])
    assert found["means"] == pytest.approx(values, rel=1e-6)
    torch.testing.assert_close(tuple(found["grads"]), grads, rtol=1e-6, atol=1e-9)


def test_without_supervision_and_images_the_step_is_zero_with_a_graph() -> None:
    student, teacher = Model(5, 0), Model(6, 10)
    tokens, _, index = whole_batch()
    targets = Targets(torch.full_like(tokens, IGNORED), torch.full_like(index, -1), [])
    taught = teacher(tokens)
    normalisers = OBJECTIVE.normalisers(taught, targets)
    terms = OBJECTIVE.terms(student(tokens), taught, targets)
    loss = OBJECTIVE.loss(terms, normalisers, beta=0.5, step=0)
    loss.backward()
    assert loss == 0
    assert torch.equal(normalisers, torch.zeros_like(normalisers))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in student.parameters())
    assert means(terms.totals, normalisers) == {"ce": 0, "distillation": 0, "rcka": 0}


@pytest.mark.parametrize(
    ("objective", "present"),
    [
        (GraceObjective(omega=0), {"ce", "distillation"}),
        (GraceObjective(distillation="none"), {"ce", "rcka"}),
        (GraceObjective(ce=0), {"distillation", "rcka"}),
        (GraceObjective(ce=0, distillation="none"), {"rcka"}),
        (GraceObjective(ce=0, omega=0), {"distillation"}),
        (GraceObjective(distillation="none", omega=0), {"ce"}),
    ],
)
def test_every_term_can_be_switched_off(objective: GraceObjective, present: set[str]) -> None:
    student, teacher = Model(5, 0), Model(6, 10)
    tokens, targets = rows(0, ROWS)
    taught = teacher(tokens)
    terms = objective.terms(student(tokens), taught, targets)
    values = means(terms.totals, terms.weights)
    assert {name for name, value in values.items() if value != 0} == present
    normalisers = objective.normalisers(taught, targets)
    torch.testing.assert_close(normalisers, terms.weights, check_dtype=False)
    loss = objective.loss(terms, normalisers, beta=0.5, step=400)
    weights = {"ce": 1.0, "distillation": 0.5, "rcka": 3.0}
    assert loss.item() == pytest.approx(sum(weights[name] * values[name] for name in present))


def test_without_terms_that_compare_no_teacher_is_needed() -> None:
    objective = GraceObjective(distillation="none", omega=0)
    tokens, targets = rows(0, ROWS)
    terms = objective.terms(Model(5, 0)(tokens), None, targets)
    torch.testing.assert_close(
        objective.normalisers(None, targets), terms.weights, check_dtype=False
    )
    assert terms.ce.total > 0


def test_ablations_of_distillation() -> None:
    student, teacher = Model(5, 0), Model(6, 10)
    tokens, targets = rows(0, ROWS)
    s, t = student(tokens), teacher(tokens)
    logits = (s.logits, t.logits, targets.labels)

    def value(**options: Any) -> Tensor:
        terms: Terms = GraceObjective(omega=0, **options).terms(s, t, targets)
        return terms.distillation.mean()

    torch.testing.assert_close(value(gate=False), gdkd_loss(*logits, gate=False))
    torch.testing.assert_close(value(distillation="kl"), kl_loss(*logits, gate=True))
    torch.testing.assert_close(value(distillation="kl", gate=False), kl_loss(*logits))
    torch.testing.assert_close(
        value(temperature=3, alpha=0.5, beta_dkd=2), gdkd_loss(*logits, 3, 0.5, 2)
    )
    different = {round(value(**o).item(), 6) for o in ({}, {"gate": False}, {"distillation": "kl"})}
    assert len(different) == 3


def test_defaults_are_those_of_the_paper() -> None:
    o = GraceObjective()
    assert (o.temperature, o.alpha, o.beta_dkd, o.omega, o.omega_warmup) == (2, 1, 4, 3, 400)
    assert (o.gate, o.distillation, o.min_tokens, o.ignore_index) == (True, "gdkd", 4, -100)


def test_omega_rises_linearly() -> None:
    objective = GraceObjective()
    steps = (0, 100, 200, 400, 10_000)
    assert [objective.omega_at(s) for s in steps] == [0, 0.75, 1.5, 3, 3]
    assert GraceObjective(omega_warmup=0).omega_at(0) == 3
    tokens, targets = rows(0, ROWS)
    terms = objective.terms(Model(5, 0)(tokens), Model(6, 10)(tokens), targets)
    losses = [objective.loss(terms, terms.weights, beta=0.5, step=s) for s in (0, 400)]
    torch.testing.assert_close(losses[1] - losses[0], 3 * terms.rcka.mean())


def test_a_step_never_waits_for_the_device() -> None:
    with FakeTensorMode():
        hidden = torch.zeros(2, 6, 3, requires_grad=True)
        head = torch.zeros(7, 3, requires_grad=True)
        index = torch.zeros(2, 6, dtype=torch.int64)
        outputs = Outputs(LazyLogits(hidden, head), hidden)
        targets = Targets(torch.zeros(2, 6, dtype=torch.int64), index, [6, 6])
        normalisers = OBJECTIVE.normalisers(outputs, targets)
        terms = OBJECTIVE.terms(outputs, outputs, targets)
        OBJECTIVE.loss(terms, normalisers, beta=0.5, step=0).backward()
        assert head.grad is not None
        assert terms.totals.shape == (3,)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ce": 0, "omega": 0, "distillation": "none"}, "every term of the objective is switched"),
        ({"omega": -1}, "the weight of a term is negative; use 0 to switch it off"),
        ({"distillation": "mse"}, "unknown distillation 'mse'"),
        ({"omega_warmup": -1}, "omega_warmup is -1"),
        ({"temperature": 0}, "the temperature is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(GracecError, match=reason):
        GraceObjective(**options)


def test_what_a_term_needs_has_to_be_there() -> None:
    tokens, targets = rows(0, ROWS)
    outputs = Model(5, 0)(tokens)
    with pytest.raises(GracecError, match="a term compares with the teacher, and there is none"):
        OBJECTIVE.terms(outputs, None, targets)
    with pytest.raises(GracecError, match="a term compares with the teacher, and there is none"):
        OBJECTIVE.normalisers(None, targets)
    with pytest.raises(GracecError, match="L_RCKA needs the hidden states .* or use omega=0"):
        OBJECTIVE.terms(outputs, Outputs(outputs.logits), targets)
    with pytest.raises(GracecError, match="L_RCKA needs the hidden states .* or use omega=0"):
        OBJECTIVE.terms(outputs, outputs, Targets(targets.labels))


def test_it_needs_torch_and_nothing_of_the_compiler() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "gracec.errors"}
    for file in Path(gracec.objective.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                names = [node.module]
            for name in names:
                inside = name.startswith("gracec.objective.")
                assert inside or name in allowed or name.split(".")[0] in allowed - {"gracec"}, file
