import math

import torch
import torch.nn.functional as F

from gracec.objective import CrossEntropy, ce_term
from tests.objective.reference import IGNORED, gradients, random_labels, random_logits


def test_a_uniform_student_pays_the_logarithm_of_the_vocabulary() -> None:
    term = ce_term(torch.zeros(3, 8), torch.tensor([1, IGNORED, 4]))
    assert term.weight == 2
    torch.testing.assert_close(term.total, torch.tensor(2 * math.log(8)))


def test_it_is_the_cross_entropy_of_torch() -> None:
    logits = random_logits(9, 7).requires_grad_()
    labels = random_labels(9, vocabulary=7)
    ours, theirs = ce_term(logits, labels, chunk_size=2).mean(), F.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits))


def test_gradcheck() -> None:
    logits = random_logits(5, 4).requires_grad_()
    labels = random_labels(5, vocabulary=4)
    assert torch.autograd.gradcheck(lambda s: ce_term(s, labels, chunk_size=2).mean(), logits)


def test_its_weights_are_one() -> None:
    assert torch.equal(CrossEntropy().weights(random_logits(3, 4).float()), torch.ones(3))
