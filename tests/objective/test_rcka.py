import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from gracec.errors import GracecError
from gracec.objective import Grams, cka, grams_of, image_count, rcka_loss, rcka_term
from tests.objective import reference
from tests.objective.reference import gradients, random_logits

# Two rows of a batch with four images: 5, 6, 5 and 3 tokens, one of them not contiguous.
INDEX = torch.tensor(
    [
        [-1, 0, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, -1],
        [2, 2, -1, 2, 2, 2, -1, -1, 3, 3, 3, -1, -1, -1],
    ]
)
SIZES = [5, 6, 5, 3]


def hidden(width: int, seed: int = 0) -> Tensor:
    return random_logits(2, 14, width, seed=seed)


def tokens(x: Tensor, image: int) -> Tensor:
    return x[image == INDEX]


def one_image(x: Tensor, y: Tensor) -> Tensor:
    """L_RCKA of a batch that is one image [n, d]."""
    return rcka_loss(x[None], y[None], torch.zeros(1, len(x), dtype=torch.int64), [len(x)])


def orthogonal(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(random_logits(width, width, seed=seed))[0]


def test_by_hand() -> None:
    """Directions at the corners of a square against two pairs of equal ones.

    Gram matrices of the centred tokens ±e1, ±e2 and of e1, e1, -e1, -e1: with the order
    e1, -e1, e2, -e2 and x, -x, x, -x the product is 4 * 2 / (sqrt(8) * 4) = 1/sqrt(2).
    """
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    pairs = torch.tensor([[2.0], [-2.0], [3.0], [-1.0]])
    similarity, defined = cka(square[None], pairs[None])
    torch.testing.assert_close(similarity, torch.tensor([0.5**0.5]))
    assert defined.all()


@pytest.mark.parametrize(("d_student", "d_teacher"), [(2, 3), (2, 20), (20, 30)])
def test_it_is_the_equations(d_student: int, d_teacher: int) -> None:
    """Also where the d x d form is used: 5 and 6 tokens in 2 and 3 dimensions."""
    student, teacher = hidden(d_student).requires_grad_(), hidden(d_teacher, 1)
    ours = rcka_loss(student, teacher, INDEX, SIZES)
    parts = [1 - reference.cka(tokens(student, i), tokens(teacher, i)) for i in (0, 1, 2)]
    theirs = torch.stack(parts).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, student), gradients(theirs, student))


@pytest.mark.parametrize(("d_student", "d_teacher"), [(1, 2), (3, 9)])
def test_gradcheck(d_student: int, d_teacher: int) -> None:
    teacher = hidden(d_teacher, 1)
    assert torch.autograd.gradcheck(
        lambda s: rcka_loss(s, teacher, INDEX, SIZES), hidden(d_student).requires_grad_()
    )


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(4, 12),
    d_student=st.integers(2, 12),
    d_teacher=st.integers(2, 12),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_it_knows_only_relations_and_is_between_zero_and_one(
    count: int, d_student: int, d_teacher: int, scale: float, seed: int
) -> None:
    student, teacher = random_logits(count, d_student, seed=seed), random_logits(count, d_teacher)
    loss = one_image(student, teacher)
    assert 0 <= loss <= 1
    per_token = random_logits(count, 1, seed=seed).abs() + 0.1
    turned = scale * per_token * (student @ orthogonal(d_student, seed))
    torch.testing.assert_close(one_image(turned, teacher), loss)
    torch.testing.assert_close(one_image(teacher, student), loss)
    assert one_image(student, turned) == pytest.approx(0, abs=1e-9)


def test_rounding_does_not_make_it_negative() -> None:
    """In float32 some quotients of equal images are above one before they are clipped."""
    x = random_logits(100, 6, 4).float()
    similarity, _ = cka(x, x)
    assert similarity.max() == 1
    assert similarity.min() > 0.999999


def test_a_shuffled_image_is_another_image() -> None:
    student = random_logits(12, 6)
    assert one_image(student, student.roll(1, 0)) > 0.3


def test_images_without_relations_are_left_out() -> None:
    """A constant image, one of zeros, and one whose tokens differ in length only."""
    student, teacher = hidden(6), hidden(7, 1)
    student[INDEX == 0] = student[0, 1].clone() * torch.arange(1.0, 6).unsqueeze(1)
    teacher[INDEX == 1] = 0
    student.requires_grad_()
    loss = rcka_loss(student, teacher, INDEX)
    torch.testing.assert_close(
        loss, 1 - reference.cka(tokens(student, 2), tokens(teacher, 2)).detach()
    )
    grad = gradients(loss, student)[0]
    assert torch.isfinite(grad).all()
    assert grad[INDEX != 2].abs().max() == 0
    assert rcka_term(student, teacher, INDEX).weight == 1
    assert image_count(teacher, INDEX) == 2


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_count_as_relations(width: int, dtype: torch.dtype) -> None:
    one = torch.randn(2, 1, width, dtype=dtype, generator=torch.Generator().manual_seed(0))
    equal = one.expand(2, 500, width)
    similarity, defined = cka(equal, torch.randn(2, 500, 8))
    assert not defined.any()
    assert torch.equal(similarity, torch.zeros(2))


@pytest.mark.parametrize("min_tokens", [3, 4, 6, 7])
def test_small_images_are_left_out(min_tokens: int) -> None:
    student, teacher = hidden(8), hidden(9, 1)
    counted = [i for i, size in enumerate(SIZES) if size >= min_tokens]
    term = rcka_term(student, teacher, INDEX, SIZES, min_tokens)
    expected = sum(1 - reference.cka(tokens(student, i), tokens(teacher, i)) for i in counted)
    assert term.weight == len(counted)
    torch.testing.assert_close(term.total, torch.as_tensor(expected, dtype=torch.float64))


def test_text_alone_is_zero_with_a_graph() -> None:
    student = hidden(6).requires_grad_()
    loss = rcka_loss(student, hidden(6, 1), torch.full_like(INDEX, -1), [])
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_text_does_not_matter() -> None:
    student, teacher = hidden(6), hidden(6, 1)
    loss = rcka_loss(student, teacher, INDEX)
    student[INDEX < 0] = float("nan")
    assert torch.equal(rcka_loss(student, teacher, INDEX), loss)


def test_sizes_are_counted_when_they_are_not_given() -> None:
    student, teacher = hidden(6), hidden(7, 1)
    assert torch.equal(
        rcka_loss(student, teacher, INDEX), rcka_loss(student, teacher, INDEX, SIZES)
    )


def test_rows_are_parts_of_the_batch() -> None:
    student, teacher = hidden(6).requires_grad_(), hidden(7, 1)
    first = rcka_term(student[:1], teacher[:1], INDEX[:1], [5, 6])
    second = rcka_term(student[1:], teacher[1:], (INDEX[1:] - 2).clamp(min=-1), [5, 3])
    images = first.weight + second.weight
    counted = image_count(teacher[:1], INDEX[:1], [5, 6])
    assert counted == first.weight == 2
    whole = rcka_loss(student, teacher, INDEX, SIZES)
    torch.testing.assert_close((first.total + second.total) / images, whole)
    grads = [gradients(part.total / images, student)[0] for part in (first, second)]
    torch.testing.assert_close(sum(grads), gradients(whole, student)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_narrow_and_extreme_hidden_states(dtype: torch.dtype, scale: float) -> None:
    student = (hidden(6) / 10 * scale).to(dtype).requires_grad_()
    teacher = (hidden(7, 1) / 10 * scale).to(dtype)
    loss = rcka_loss(student, teacher, INDEX, SIZES)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()
    wide = rcka_loss(student.double(), teacher.double(), INDEX, SIZES)
    torch.testing.assert_close(loss, wide.float(), rtol=1e-5, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = hidden(6).requires_grad_(), hidden(6, 1).requires_grad_()
    rcka_loss(student, teacher, INDEX, SIZES).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_with_sizes_nothing_waits_for_the_device() -> None:
    """Fake tensors have no data: reading a value, or a shape that depends on one, raises."""
    with FakeTensorMode():
        student = torch.zeros(2, 14, 6, requires_grad=True)
        teacher, index = torch.zeros(2, 14, 7), torch.zeros(2, 14, dtype=torch.int64)
        rcka_loss(student, teacher, index, SIZES).backward()
        image_count(teacher, index, SIZES)
        assert student.grad is not None
        with pytest.raises(DynamicOutputShapeException):
            rcka_loss(student, teacher, index)


@pytest.mark.parametrize(
    ("student", "teacher", "index", "sizes", "reason"),
    [
        ((2, 5, 3), (2, 4, 3), (2, 5), None, "the student has tokens .2, 5., the teacher .2, 4."),
        ((2, 5, 3), (2, 5, 3), (2, 4), None, "do not go with image_index .2, 4."),
        ((10, 3), (10, 3), (10,), None, "they are .B, T, d. and .B, T."),
        ((1, 5, 3), (1, 5, 3), (1, 5), [4, 4], "8 visual tokens do not fit into 5 positions"),
    ],
)
def test_what_does_not_fit_is_refused(
    student: tuple[int, ...],
    teacher: tuple[int, ...],
    index: tuple[int, ...],
    sizes: list[int] | None,
    reason: str,
) -> None:
    with pytest.raises(GracecError, match=reason):
        rcka_loss(
            torch.zeros(student), torch.zeros(teacher), torch.zeros(index, dtype=torch.int64), sizes
        )


def test_an_index_that_is_no_int64_is_refused() -> None:
    with pytest.raises(GracecError, match="image_index: it is int64, this is torch.float32"):
        rcka_loss(hidden(3), hidden(3), INDEX.float())


@pytest.mark.parametrize("width", [3, 20])
def test_gram_matrices_stand_for_the_hidden_states_of_a_teacher(width: int) -> None:
    """Whatever form is computed with the states themselves; an image without relations too."""
    student, teacher = hidden(8).requires_grad_(), hidden(width, 1)
    teacher[INDEX == 1] = teacher[0, 7].clone()
    grams = grams_of(teacher, INDEX, SIZES)
    assert [tuple(gram.shape) for gram in grams.matrices] == [(n, n) for n in SIZES]
    counts = [image_count(given, INDEX, SIZES) for given in (teacher, grams)]
    assert counts[0] == counts[1] == 2
    found = [rcka_loss(student, given, INDEX, SIZES) for given in (teacher, grams)]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(gradients(found[1], student), gradients(found[0], student))
    with pytest.raises(GracecError, match="its Gram matrices are those of other images"):
        rcka_loss(student, Grams(grams.matrices[1:]), INDEX, SIZES)
