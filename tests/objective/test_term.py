import torch

from gracec.objective import Term
from gracec.objective.term import divide, zero_with_graph


def test_a_term_is_the_quotient_of_its_sums() -> None:
    assert Term(torch.tensor(6.0), torch.tensor(4.0)).mean() == 1.5


def test_a_term_without_weight_is_zero_with_a_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    mean = Term((0 * x).sum(), torch.tensor(0.0)).mean()
    mean.backward()
    assert mean == 0
    assert torch.equal(x.grad, torch.zeros(3))


def test_small_weights_divide_as_they_are() -> None:
    totals, weights = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.25, 0.0, 2.0**-9])
    assert torch.equal(divide(totals, weights), torch.tensor([4.0, 0.0, 1536.0]))


def test_a_zero_with_a_graph_ignores_what_is_not_finite() -> None:
    x = torch.tensor([[float("nan"), float("inf")]], requires_grad=True)
    zero = zero_with_graph(x)
    zero.backward()
    assert zero == 0
    assert torch.equal(x.grad, torch.zeros(1, 2))
