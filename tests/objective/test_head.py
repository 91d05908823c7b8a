import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gracec.errors import GracecError
from gracec.objective import (
    CrossEntropy,
    Gdkd,
    LazyLogits,
    Term,
    gdkd_loss,
    in_chunks,
    kl_loss,
    position_terms,
    position_weight,
)
from gracec.objective import head as head_module
from tests.objective import reference
from tests.objective.reference import (
    IGNORED,
    gradients,
    random_labels,
    random_logits,
)

LABELS = random_labels(9, vocabulary=7)


def both(student: LazyLogits, teacher: LazyLogits | Tensor, chunk_size: int = 4) -> Tensor:
    """L_CE + L_GDKD."""
    ce, gdkd = position_terms(
        [CrossEntropy(), Gdkd()],
        student,
        teacher,
        LABELS,
        ignore_index=IGNORED,
        chunk_size=chunk_size,
    )
    return ce.mean() + gdkd.mean()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of a student [9, 3], [7, 3] and of a wider teacher."""
    return (
        random_logits(9, 3).requires_grad_(),
        random_logits(7, 3, seed=1).requires_grad_(),
        random_logits(9, 4, seed=2),
        random_logits(7, 4, seed=3),
    )


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_head_and_loss_in_chunks_are_the_straightforward_form(chunk_size: int) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    logits, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    plain = F.cross_entropy(logits, LABELS) + reference.gdkd(logits, teacher, LABELS)
    lazy = both(LazyLogits(hidden, head), LazyLogits(teacher_hidden, teacher_head), chunk_size)
    torch.testing.assert_close(lazy, plain)
    torch.testing.assert_close(gradients(lazy, hidden, head), gradients(plain, hidden, head))


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_with_a_bias_and_a_soft_cap(chunk_size: int) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    bias, wrong = random_logits(7, seed=4).requires_grad_(), random_logits(7, seed=5)

    def cap(x: Tensor) -> Tensor:
        return torch.tanh(x / 2) * 2

    logits = cap(F.linear(hidden, head, bias))
    teacher = cap(F.linear(teacher_hidden, teacher_head, wrong))
    plain = F.cross_entropy(logits, LABELS) + reference.gdkd(logits, teacher, LABELS)
    taught = LazyLogits(teacher_hidden, teacher_head, wrong, cap)
    lazy = both(LazyLogits(hidden, head, bias, cap), taught, chunk_size)
    torch.testing.assert_close(lazy, plain)
    learn = hidden, head, bias
    torch.testing.assert_close(gradients(lazy, *learn), gradients(plain, *learn))
    parts = list(in_chunks(LazyLogits(hidden, head, bias, cap), teacher, chunk_size=chunk_size))
    assert [chunk.start for chunk, _ in parts] == list(range(0, 9, chunk_size))
    for number, whole in enumerate((logits, teacher)):
        seen = torch.cat([found[number] for _, found in parts])
        torch.testing.assert_close(seen, whole.detach())


def test_a_chunk_is_as_large_as_its_logits_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 3 * 7 * 4)
    logits = random_logits(9, 7)
    assert [len(part) for _, (part,) in in_chunks(logits)] == [3, 3, 3]
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    assert [len(part) for _, (part,) in in_chunks(logits[:2])] == [1, 1]


def test_a_single_chunk_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is kept for the backward pass; what does not is computed again."""
    hidden, head, teacher_hidden, teacher_head = inputs()
    calls: list[int] = []
    linear = F.linear

    def counted(*operands: Tensor) -> Tensor:
        calls.append(len(operands[0]))
        return linear(*operands)

    monkeypatch.setattr(F, "linear", counted)
    for chunk_size, expected in ((9, [9, 9]), (5, [5, 5, 4, 4] * 2)):
        calls.clear()
        teacher = LazyLogits(teacher_hidden, teacher_head)
        both(LazyLogits(hidden, head), teacher, chunk_size).backward()
        assert calls == expected


def test_a_teacher_of_either_form_is_the_same() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    student = LazyLogits(hidden, head)
    lazy = both(student, LazyLogits(teacher_hidden, teacher_head))
    torch.testing.assert_close(lazy, both(student, teacher_hidden @ teacher_head.T))


def test_gradcheck() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    teacher = LazyLogits(teacher_hidden[:4], teacher_head[:3])
    labels = torch.tensor([2, IGNORED, 0, 1])

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return gdkd_loss(LazyLogits(h, w), teacher, labels, chunk_size=3)

    small = (hidden[:4].detach().requires_grad_(), head[:3].detach().requires_grad_())
    assert torch.autograd.gradcheck(loss, small)


def test_a_tied_head_collects_both_gradients() -> None:
    _, table, _, _ = inputs()
    tokens = torch.arange(9) % 7

    def loss(lazy: bool) -> Tensor:
        hidden = table[tokens].tanh()
        teacher = random_logits(9, 7, seed=5)
        if lazy:
            return gdkd_loss(LazyLogits(hidden, table), teacher, LABELS, chunk_size=2)
        return reference.gdkd(hidden @ table.T, teacher, LABELS)

    torch.testing.assert_close(gradients(loss(True), table), gradients(loss(False), table))


def test_a_frozen_head_and_frozen_hidden_states_get_no_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    teacher = LazyLogits(teacher_hidden, teacher_head)
    both(LazyLogits(hidden, head.detach()), teacher).backward()
    only_hidden = hidden.grad.clone()
    both(LazyLogits(hidden.detach(), head), teacher).backward()
    assert torch.equal(hidden.grad, only_hidden)
    assert head.grad.abs().max() > 0


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_narrow_hidden_states_give_the_logits_of_the_model(head_dtype: torch.dtype) -> None:
    hidden, head, _, _ = (x.detach() for x in inputs())
    hidden = hidden.bfloat16().requires_grad_()
    head = head.to(head_dtype).requires_grad_()
    teacher = random_logits(9, 7, seed=5)
    lazy = kl_loss(LazyLogits(hidden, head), teacher, LABELS, chunk_size=100)
    plain = kl_loss(hidden @ head.bfloat16().T, teacher, LABELS, chunk_size=100)
    assert torch.equal(lazy, plain)
    ours, theirs = gradients(lazy, hidden, head), gradients(plain, hidden, head)
    assert [g.dtype for g in ours] == [torch.bfloat16, head_dtype]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


def test_all_positions_with_shifted_labels() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    labels = LABELS.reshape(3, 3)
    lazy = gdkd_loss(
        LazyLogits(hidden.reshape(3, 3, 3), head),
        LazyLogits(teacher_hidden.reshape(3, 3, 4), teacher_head),
        labels,
    )
    plain = gdkd_loss(
        (hidden @ head.T).reshape(3, 3, 7),
        (teacher_hidden @ teacher_head.T).reshape(3, 3, 7),
        labels,
    )
    torch.testing.assert_close(lazy, plain)


def test_without_positions_the_gradients_are_zero() -> None:
    _, head, _, teacher_head = inputs()
    hidden = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    loss = gdkd_loss(
        LazyLogits(hidden, head),
        LazyLogits(torch.zeros(0, 4, dtype=torch.float64), teacher_head),
        torch.zeros(0, dtype=torch.int64),
    )
    loss.backward()
    assert loss == 0
    assert torch.equal(head.grad, torch.zeros_like(head))
    assert hidden.grad.shape == (0, 3)


class LargestTensor(TorchDispatchMode):
    """The most elements that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "as_strided" not in str(func):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk() -> None:
    """Forward and backward of 64 positions over 50 classes, 4 positions at a time."""
    hidden, head = torch.randn(64, 2, requires_grad=True), torch.randn(50, 2, requires_grad=True)
    teacher = LazyLogits(torch.randn(64, 2), torch.randn(50, 2))
    with LargestTensor() as seen:
        gdkd_loss(
            LazyLogits(hidden, head), teacher, torch.zeros(64).long(), chunk_size=4
        ).backward()
    assert seen.elements == 4 * 50


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        hidden, head = torch.zeros(9, 3, requires_grad=True), torch.zeros(7, 3, requires_grad=True)
        student, teacher = (
            LazyLogits(hidden, head),
            LazyLogits(torch.zeros(9, 4), torch.zeros(7, 4)),
        )
        labels = torch.zeros(9, dtype=torch.int64)
        gdkd_loss(student, teacher, labels, chunk_size=4).backward()
        position_weight(Gdkd(), teacher, labels, ignore_index=IGNORED, chunk_size=4)
        assert head.grad is not None


def test_the_weight_is_known_before_the_student_runs() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    teacher = LazyLogits(teacher_hidden, teacher_head)
    term: Term
    (term,) = position_terms(
        [Gdkd()], LazyLogits(hidden, head), teacher, LABELS, ignore_index=IGNORED, chunk_size=4
    )
    early = position_weight(Gdkd(), teacher, LABELS, ignore_index=IGNORED, chunk_size=2)
    torch.testing.assert_close(early, term.weight)
    assert not term.weight.requires_grad


def test_a_head_of_another_width_is_refused() -> None:
    with pytest.raises(GracecError, match="hidden states .9, 3. do not go with a head .7, 4."):
        LazyLogits(torch.zeros(9, 3), torch.zeros(7, 4))


def test_a_bias_of_another_size_is_refused() -> None:
    with pytest.raises(GracecError, match="a bias .3. does not go with a head .7, 3."):
        LazyLogits(torch.zeros(9, 3), torch.zeros(7, 3), torch.zeros(3))


def test_heads_of_different_vocabularies_are_refused() -> None:
    student, teacher = (LazyLogits(torch.zeros(9, 3), torch.zeros(v, 3)) for v in (7, 8))
    with pytest.raises(GracecError, match="the student has 7 logits, the teacher 8"):
        both(student, teacher)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(GracecError, match="distillation needs the teacher's logits"):
        position_terms(
            [Gdkd()], torch.zeros(9, 7), None, LABELS, ignore_index=IGNORED, chunk_size=4
        )
