import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gracec.errors import GracecError
from gracec.objective import gdkd_loss, gdkd_term, kl_loss
from tests.objective import reference
from tests.objective.reference import (
    IGNORED,
    gradients,
    random_labels,
    random_logits,
)


def test_by_hand() -> None:
    """p_t = (1/2, 1/4, 1/4), p_s = (1/3, 1/3, 1/3) at T = 1, y = 0.

    TCKD = 1/2 ln(3/2) + 1/2 ln(3/4); the other classes agree, NCKD = 0. For y = 1 p̂_t = (2/3, 1/3).
    """
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.zeros(1, 3)
    target = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    found = gdkd_loss(student, teacher, torch.tensor([0]), temperature=1)
    torch.testing.assert_close(found, torch.tensor(target))
    target = 0.25 * math.log(3 / 4) + 0.75 * math.log(9 / 8)
    others = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    found = gdkd_loss(student, teacher, torch.tensor([1]), temperature=1, alpha=3, beta=5)
    torch.testing.assert_close(found, torch.tensor(3 * target + 5 * others))


@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_equations(gated: bool) -> None:
    student = random_logits(8, 6).requires_grad_()
    teacher, labels = random_logits(8, 6, seed=1), random_labels(8, vocabulary=6)
    ours = gdkd_loss(student, teacher, labels, 3.0, 0.7, 2.5, chunk_size=3, gate=gated)
    theirs = reference.gdkd(student, teacher, labels, 3.0, 0.7, 2.5, gated)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, student), gradients(theirs, student))


def test_gradcheck() -> None:
    student, teacher = random_logits(4, 3).requires_grad_(), random_logits(4, 3, seed=1)
    labels = random_labels(4, vocabulary=3)
    assert torch.autograd.gradcheck(lambda s: gdkd_loss(s, teacher, labels, chunk_size=3), student)
    whole = student.detach().reshape(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: gdkd_loss(s, teacher.reshape(2, 2, 3), labels.reshape(2, 2)), whole
    )


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = random_logits(2, 5).requires_grad_(), random_logits(2, 5).requires_grad_()
    gdkd_loss(student, teacher, torch.tensor([0, 1])).backward()
    assert teacher.grad is None
    assert student.grad is not None


@settings(max_examples=30, deadline=None)
@given(
    vocabulary=st.integers(2, 20),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_the_parts_add_up_to_the_classical_divergence(
    vocabulary: int, scale: float, temperature: float, seed: int
) -> None:
    """TCKD + (1 - p_t(y)) NCKD = KL(p_t || p_s)."""
    student = random_logits(1, vocabulary, scale=scale, seed=seed)
    teacher = random_logits(1, vocabulary, scale=scale, seed=seed + 1)
    label = torch.tensor([seed % vocabulary])
    rest = 1 - float((teacher / temperature).softmax(1)[0, label])
    parts = gdkd_loss(student, teacher, label, temperature, 1.0, rest, gate=False)
    torch.testing.assert_close(parts, kl_loss(student, teacher, label, temperature))


@settings(max_examples=15, deadline=None)
@given(chunk_size=st.integers(1, 12), seed=st.integers(0, 100))
def test_chunks_change_nothing(chunk_size: int, seed: int) -> None:
    student = random_logits(11, 6, seed=seed).requires_grad_()
    teacher, labels = random_logits(11, 6, seed=seed + 1), random_labels(11, vocabulary=6)
    whole = gdkd_loss(student, teacher, labels)
    chunked = gdkd_loss(student, teacher, labels, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(chunked, student), gradients(whole, student), rtol=1e-12, atol=1e-15
    )


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 100))
def test_a_batch_that_is_cut_anywhere_gives_the_same_step(cuts: list[int], seed: int) -> None:
    student = random_logits(12, 5, seed=seed).requires_grad_()
    teacher, labels = (
        random_logits(12, 5, seed=seed + 1),
        random_labels(12, vocabulary=5, seed=seed),
    )
    ends = [0, *sorted(cuts), 12]
    parts = [gdkd_term(student[a:b], teacher[a:b], labels[a:b]) for a, b in pairwise(ends)]
    normaliser = sum(part.weight for part in parts)
    grads = [gradients(part.total / normaliser, student)[0] for part in parts]
    whole = gdkd_loss(student, teacher, labels)
    torch.testing.assert_close(sum(part.total for part in parts) / normaliser, whole)
    torch.testing.assert_close(sum(grads), gradients(whole, student)[0])


@pytest.mark.parametrize("positions", [0, 3])
def test_without_supervision_it_is_zero_with_a_graph(positions: int) -> None:
    student = torch.randn(positions, 5, requires_grad=True)
    labels = torch.full((positions,), IGNORED)
    loss = gdkd_loss(student, torch.randn(positions, 5), labels)
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros(positions, 5))


def test_what_is_not_supervised_may_be_nan() -> None:
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    student[1] = teacher[1] = float("nan")
    student.requires_grad_()
    loss = gdkd_loss(student, teacher, torch.tensor([2, IGNORED]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert student.grad[0].abs().max() > 0
    assert student.grad[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_extreme_logits_stay_finite(dtype: torch.dtype, label: int) -> None:
    rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, 1e4]]
    extreme = torch.tensor(rows, dtype=dtype)
    student = extreme.repeat_interleave(4, 0).requires_grad_()
    loss = gdkd_loss(student, extreme.repeat(4, 1), torch.full((16,), label))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    assert torch.isfinite(loss)
    assert loss > 100
    assert torch.isfinite(student.grad).all()


def test_narrow_logits_are_computed_in_float32() -> None:
    student, teacher = random_logits(4, 6).bfloat16(), random_logits(4, 6, seed=1).bfloat16()
    labels = torch.arange(4)
    narrow, wide = (
        gdkd_loss(x(student), x(teacher), labels) for x in (lambda z: z, lambda z: z.float())
    )
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide)


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    student = random_logits(4, 6).requires_grad_()
    loss = gdkd_loss(student, student.detach().clone(), torch.arange(4))
    assert loss == 0
    assert gradients(loss, student)[0].abs().max() < 1e-15


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no data: reading a value, or a shape that depends on one, raises."""
    with FakeTensorMode():
        student = torch.zeros(2, 6, 5, requires_grad=True)
        labels = torch.zeros(2, 6, dtype=torch.int64)
        gdkd_loss(student, torch.zeros(2, 6, 5), labels, chunk_size=4).backward()
        assert student.grad is not None


@pytest.mark.parametrize(
    ("vocabularies", "options", "reason"),
    [
        ((5, 6), {}, "the student has 5 logits, the teacher 6; both need one tokenizer"),
        ((1, 1), {}, "a vocabulary of 1 leaves no choice"),
        ((5, 5), {"temperature": 0}, "the temperature is 0"),
        ((5, 5), {"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    vocabularies: tuple[int, int], options: dict[str, int], reason: str
) -> None:
    student, teacher = (torch.zeros(2, v) for v in vocabularies)
    with pytest.raises(GracecError, match=reason):
        gdkd_loss(student, teacher, torch.tensor([0, 0]), **options)  # type: ignore[arg-type]
