import pytest
import torch

from gracec.objective import LazyLogits, gdkd_loss, kl_loss, rcka_loss
from gracec.objective.precision import no_autocast, wide
from tests.objective.reference import gradients, random_labels, random_logits


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_dtype_of_computation(given: torch.dtype, used: torch.dtype) -> None:
    assert wide(torch.ones(2, dtype=given)).dtype == used


def test_a_tensor_that_is_wide_is_not_copied() -> None:
    x = torch.ones(2)
    assert wide(x) is x


def test_autocast_is_kept_out() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with no_autocast(x):
            assert (x @ x).dtype == torch.float32


def test_losses_are_the_same_under_autocast() -> None:
    student, teacher = random_logits(6, 8).float(), random_logits(6, 8, seed=1).float()
    labels = random_labels(6, vocabulary=8)
    hidden = student.requires_grad_()
    head = random_logits(8, 8, seed=2).float().requires_grad_()
    index = torch.zeros(1, 6, dtype=torch.int64)

    def losses() -> list[torch.Tensor]:
        return [
            gdkd_loss(LazyLogits(hidden, head), teacher, labels),
            kl_loss(LazyLogits(hidden, head), teacher, labels),
            rcka_loss(hidden[None], teacher[None], index),
        ]

    outside = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses()
        grads = gradients(inside[0], hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
    for a, b in zip(grads, gradients(outside[0], hidden, head), strict=True):
        assert torch.equal(a, b)
