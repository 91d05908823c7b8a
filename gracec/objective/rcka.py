"""Relational alignment of visual tokens, L_RCKA of GRACE (arXiv 2601.22709).

For the n visual tokens of one image, F [n, d] with rows of unit length, H = I - 11ᵀ/n:

    K_c = H F Fᵀ H
    CKA = <K_c^t, K_c^s>_F / (‖K_c^t‖_F ‖K_c^s‖_F)
    L_RCKA = mean over images of (1 - CKA)

This is linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of the angles between
tokens: it asks the student to relate the parts of an image as the teacher does, in a space of its
own width. Scaling a token, and rotating or reflecting all of them, changes nothing.

With X = H F two forms are equal, and the one with the smaller matrices is computed:

    n × n    <X_t X_tᵀ, X_s X_sᵀ>_F            d × d    ‖X_tᵀ X_s‖²_F

Of the teacher nothing but K_c^t is looked at, so that it may be given as that (`Grams`), as it is
where it was computed once and kept.

An image with fewer than `min_tokens` tokens is left out, and so is one whose tokens all point the
same way (‖K_c‖_F ≤ 1e-10 n), in the student or in the teacher: it has no relations to align. Which
images are too small is known on the host; the rest is masked, so that no value is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.objective.precision import no_autocast, wide
from gracec.objective.term import Term, zero_with_graph

MIN_TOKENS = 4
DEGENERATE = 1e-10
"""‖K_c‖_F / n from which on the directions differ by no more than float32 rounds."""


@dataclass(frozen=True)
class Grams:
    """K_c of each image of a batch, in the order of their numbers: [n, n], float32 or float64."""

    matrices: tuple[Tensor, ...]


Relations = Tensor | Grams
"""How the visual tokens of a teacher relate: its hidden states [B, T, d], or their `Grams`."""


def cka(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Linear CKA of the directions of two sets of tokens.

    Args:
        x: [N, n, d_x], N images of n tokens, any float dtype; computed in float32 or float64.
        y: [N, n, d_y].

    Returns:
        The similarity [N], in [0, 1], and bool [N]: whether it is defined. Zero where it is not.
    """
    with no_autocast(x):
        x, y = _centred_directions(x), _centred_directions(y)
        if x.shape[1] <= max(x.shape[2], y.shape[2]):
            gram_x, gram_y = x @ x.mT, y @ y.mT
            cross = (gram_x * gram_y).sum((1, 2))
        else:
            gram_x, gram_y = x.mT @ x, y.mT @ y
            cross = (x.mT @ y).square().sum((1, 2))
        return _similarity(cross, gram_x, gram_y, x.shape[1])


def _cka_with_gram(x: Tensor, gram_y: Tensor) -> tuple[Tensor, Tensor]:
    """The same of tokens [N, n, d] and K_c [N, n, n] of the others."""
    with no_autocast(x):
        x = _centred_directions(x)
        gram_x = x @ x.mT
        cross = (gram_x * gram_y).sum((1, 2))
        return _similarity(cross, gram_x, gram_y, x.shape[1])


def _similarity(
    cross: Tensor, gram_x: Tensor, gram_y: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    norm_x, defined_x = _norm(gram_x, tokens)
    norm_y, defined_y = _norm(gram_y, tokens)
    defined = defined_x & defined_y
    similarity = (cross / (norm_x * norm_y)).clamp(max=1)
    return torch.where(defined, similarity, 0), defined


@torch.no_grad()
def grams_of(hidden: Tensor, image_index: Tensor, image_sizes: Sequence[int]) -> Grams:
    """K_c of every image; arguments and errors as in `rcka_loss`."""
    found: dict[int, Tensor] = {}
    with no_autocast(hidden):
        for numbers, positions in _images(hidden.shape, image_index, image_sizes, 0):
            x = _centred_directions(_tokens(hidden, positions))
            found |= dict(zip(numbers, (x @ x.mT).unbind(), strict=True))
    return Grams(tuple(found[number] for number in sorted(found)))


def rcka_term(
    student_hidden: Tensor,
    teacher_hidden: Relations,
    image_index: Tensor,
    image_sizes: Sequence[int] | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Term:
    """The sum of 1 - CKA and the number of images; arguments and errors as in `rcka_loss`."""
    taught = teacher_hidden
    if isinstance(taught, Tensor) and student_hidden.shape[:-1] != taught.shape[:-1]:
        raise GracecError(
            f"the student has tokens {list(student_hidden.shape[:-1])}, "
            f"the teacher {list(taught.shape[:-1])}",
            where="teacher_hidden",
            fix="run both on the same batch",
        )
    total = wide(zero_with_graph(student_hidden))
    weight = torch.zeros_like(total)
    for numbers, positions in _images(student_hidden.shape, image_index, image_sizes, min_tokens):
        student = _tokens(student_hidden, positions)
        if isinstance(taught, Grams):
            similarity, defined = _cka_with_gram(student, _chosen(taught, numbers, positions))
        else:
            similarity, defined = cka(student, _tokens(taught.detach(), positions))
        total = total + torch.where(defined, 1 - similarity, 0).sum()
        weight = weight + defined.sum()
    return Term(total, weight)


def rcka_loss(
    student_hidden: Tensor,
    teacher_hidden: Relations,
    image_index: Tensor,
    image_sizes: Sequence[int] | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Tensor:
    """L_RCKA = mean over images of (1 - CKA) of student and teacher at the visual tokens.

    Args:
        student_hidden: [B, T, d_s], output of the penultimate decoder block, any float dtype.
            float64 is computed in float64, everything else in float32.
        teacher_hidden: [B, T, d_t] of the same tokens, or `Grams` of the same images; gets no
            gradient.
        image_index: int64 [B, T], the number of the image a token belongs to, counted from 0 over
            the whole batch; -1 for text.
        image_sizes: tokens of each image, in the order of their numbers, as Python integers. With
            them nothing waits for a device; without them they are counted there and read back.
        min_tokens: images with fewer visual tokens are left out.

    Returns:
        A scalar in [0, 1], without unit; zero with a graph when no image counts.

    Raises:
        GracecError: if shapes do not fit, or `image_sizes` holds more tokens than the batch.
    """
    return rcka_term(student_hidden, teacher_hidden, image_index, image_sizes, min_tokens).mean()


@torch.no_grad()
def image_count(
    teacher_hidden: Relations,
    image_index: Tensor,
    image_sizes: Sequence[int] | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Tensor:
    """Images that count in L_RCKA as far as the teacher tells: a float scalar.

    Arguments and errors as in `rcka_loss`. An image that is degenerate in the student alone is
    still counted, since the student has not run: it then contributes zero to the mean.
    """
    taught = teacher_hidden
    hidden = taught if isinstance(taught, Tensor) else None
    counts: list[Tensor] = []
    shape = (*image_index.shape, 0) if hidden is None else hidden.shape
    with no_autocast(image_index if hidden is None else hidden):
        for numbers, positions in _images(shape, image_index, image_sizes, min_tokens):
            if isinstance(taught, Grams):
                gram = _chosen(taught, numbers, positions)
            else:
                x = _centred_directions(_tokens(taught, positions))
                gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
            counts.append(_norm(gram, positions.shape[1])[1].sum())
    zero = torch.zeros((), device=image_index.device)
    zero = zero if hidden is None else wide(hidden.new_zeros(()))
    return zero + sum(counts, zero)


def _chosen(grams: Grams, numbers: Sequence[int], positions: Tensor) -> Tensor:
    """K_c [N, n, n] of some images of one size, whose tokens are at `positions` [N, n]."""
    count, size = positions.shape[1], len(grams.matrices)
    if max(numbers) >= size or any(len(grams.matrices[number]) != count for number in numbers):
        raise GracecError(
            "its Gram matrices are those of other images",
            where="teacher_hidden",
            fix="give those of the same batch",
        )
    return torch.stack([grams.matrices[number] for number in numbers])


def _images(
    hidden: Sequence[int], image_index: Tensor, image_sizes: Sequence[int] | None, min_tokens: int
) -> list[tuple[list[int], Tensor]]:
    """For each size n that occurs the numbers of its N images, and the flat positions of their
    tokens, int64 [N, n].

    Args:
        hidden: the shape of the hidden states, [B, T, d].
    """
    if len(hidden) != 3 or image_index.shape != tuple(hidden[:2]):
        raise GracecError(
            f"hidden states {list(hidden)} do not go with image_index {list(image_index.shape)}",
            fix="they are [B, T, d] and [B, T]",
        )
    if image_index.dtype != torch.int64:
        raise GracecError(f"it is int64, this is {image_index.dtype}", where="image_index")
    flat = image_index.flatten()
    if image_sizes is None:
        image_sizes = torch.bincount(flat + 1)[1:].tolist()
    sizes = [int(size) for size in image_sizes]
    text = flat.numel() - sum(sizes)
    if text < 0:
        raise GracecError(
            f"{sum(sizes)} visual tokens do not fit into {flat.numel()} positions",
            where="image_sizes",
        )
    # A stable sort puts text first and then image after image, each in the order of its tokens.
    images = flat.argsort(stable=True)[text:].split(sizes)
    by_size: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        if size >= min_tokens:
            by_size.setdefault(size, []).append(number)
    return [
        (numbers, torch.stack([images[number] for number in numbers]))
        for numbers in by_size.values()
    ]


def _tokens(hidden: Tensor, positions: Tensor) -> Tensor:
    """[B, T, d] at flat positions [N, n] -> [N, n, d]."""
    chosen = hidden.flatten(0, 1).index_select(0, positions.flatten())
    return chosen.reshape(*positions.shape, -1)


def _centred_directions(x: Tensor) -> Tensor:
    """Rows [N, n, d] of unit length, less their mean over n; a row of zeros has no direction."""
    x = wide(x)
    square = x.square().sum(2, keepdim=True)
    length = torch.where(square > 0, square, 1).sqrt()
    x = x / length
    return x - x.mean(1, keepdim=True)


def _norm(gram: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Frobenius norm of centred Gram matrices [N], and whether it is more than rounding."""
    square = gram.square().sum((1, 2))
    defined = square > (DEGENERATE * tokens) ** 2
    return torch.where(defined, square, 1).sqrt(), defined
