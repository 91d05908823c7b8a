import pytest
import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.quant.second_moments import DEAD, SecondMoments, blocks_of, importance


def rows(seed: int, count: int = 7, features: int = 8) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_are_the_mean_of_products(full: bool, dtype: torch.dtype) -> None:
    samples = [rows(seed, count=3 + seed).to(dtype) for seed in range(4)]
    moments = SecondMoments(8, full=full)
    for sample in samples:
        moments.add(0, sample)
    every = torch.cat(samples).double()
    expected = every.T @ every / len(every)
    found = moments.means()
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found[0].double(), expected if full else expected.diagonal(), rtol=1e-5, atol=1e-6
    )
    assert moments.counts == [3 + 4 + 5 + 6]


def test_the_error_of_an_output_is_what_they_say() -> None:
    """|X D'|^2 / n = tr(D H D')."""
    x, difference = rows(0, 50), rows(1, 5)
    moments = SecondMoments(8, full=True)
    moments.add(0, x)
    expected = (x @ difference.T).square().sum() / len(x)
    found = (difference @ moments.means()[0] @ difference.T).diagonal().sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("full", [True, False])
def test_a_matrix_without_rows_has_those_of_all(full: bool) -> None:
    moments = SecondMoments(8, 3, full=full)
    moments.add(0, rows(0, 30))
    moments.add(2, rows(1, 10))
    assert moments.unseen_parts == 1 and moments.seen
    means = moments.means()
    torch.testing.assert_close(means[1], (30 * means[0] + 10 * means[2]) / 40)


def test_nothing_and_what_is_not_finite_are_errors() -> None:
    moments = SecondMoments(8, full=False)
    assert not moments.seen
    with pytest.raises(GracecError, match="no input was observed; give calibration data"):
        moments.means()
    moments.add(0, rows(0) * float("inf"))
    with pytest.raises(GracecError, match="an input holds NaN or infinity"):
        moments.means()


def test_a_feature_that_is_always_0_counts_a_little() -> None:
    found = importance(torch.tensor([[4.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))
    assert found.tolist()[0] == [4.0, pytest.approx(2 * DEAD), 2.0, 2.0]
    assert found.tolist()[1] == [1.0, 1.0, 1.0, 1.0]


def test_the_blocks_are_those_on_the_diagonal() -> None:
    moments = SecondMoments(8, full=True)
    x = rows(0, 20)
    x[:, 5] = 0
    moments.add(0, x)
    matrix = moments.means()[0]
    blocks = blocks_of(matrix, 4)
    assert blocks.shape == (2, 4, 4)
    assert torch.equal(blocks[0], matrix[:4, :4])
    assert blocks[1][1, 1] == matrix.diagonal().mean() * DEAD  # and the rest as it is
    blocks[1][1, 1] = 0
    assert torch.equal(blocks[1], matrix[4:, 4:])
