import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gracec.errors import GracecError
from gracec.objective import confidence_gate, kl_loss, kl_term
from tests.objective.reference import gradients, random_labels, random_logits


def test_by_hand() -> None:
    """p_t = (3/4, 1/4), p_s = (1/2, 1/2) at T = 2: T² KL = 4 (3/4 ln 3/2 + 1/4 ln 1/2)."""
    teacher = 2 * torch.tensor([[0.75, 0.25]]).log()
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    found = kl_loss(torch.zeros(1, 2), teacher, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_it_is_the_divergence_of_torch(temperature: float) -> None:
    student = random_logits(9, 7).requires_grad_()
    teacher = random_logits(9, 7, seed=1)
    labels = torch.arange(9) % 7
    log_s, log_t = ((x / temperature).log_softmax(1) for x in (student, teacher))
    theirs = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * temperature**2
    ours = kl_loss(student, teacher, labels, temperature, chunk_size=4)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, student), gradients(theirs, student))


@pytest.mark.parametrize("gate", [False, True])
def test_gradcheck(gate: bool) -> None:
    student, teacher = random_logits(4, 3).requires_grad_(), random_logits(4, 3, seed=1)
    labels = random_labels(4, vocabulary=3)
    assert torch.autograd.gradcheck(
        lambda s: kl_loss(s, teacher, labels, gate=gate, chunk_size=2), student
    )


def test_the_gate_weighs_positions() -> None:
    student, teacher = random_logits(3, 4), random_logits(3, 4, seed=1)
    labels = torch.tensor([0, 1, 2])
    gates = confidence_gate(teacher)
    single = torch.stack(
        [kl_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(3)]
    )
    term = kl_term(student, teacher, labels, gate=True)
    torch.testing.assert_close(term.total, (gates * single).sum())
    torch.testing.assert_close(term.weight, gates.sum())
    torch.testing.assert_close(kl_loss(student, teacher, labels), single.mean())


def test_a_gate_is_one_for_certainty_and_one_over_e_for_none() -> None:
    uniform, certain = torch.zeros(9), torch.tensor([1e4] + [0.0] * 8)
    torch.testing.assert_close(confidence_gate(uniform), torch.tensor(1 / math.e))
    assert confidence_gate(certain) == 1
    half = torch.tensor([0.0, 0.0, -1e4, -1e4])
    torch.testing.assert_close(confidence_gate(half), torch.tensor(math.exp(-0.5)))


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(2, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_a_gate_is_between_one_over_e_and_one(vocabulary: int, scale: float, seed: int) -> None:
    gates = confidence_gate(random_logits(5, vocabulary, scale=scale, seed=seed).float())
    assert gates.min() >= torch.tensor(-1.0).exp()
    assert gates.max() <= 1


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_softens_nothing_is_refused(temperature: float) -> None:
    with pytest.raises(GracecError, match="the temperature is"):
        kl_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), temperature)
