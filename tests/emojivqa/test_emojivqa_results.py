"""Figures are computed as they are described, and quoted as they were computed."""

import pytest
import readme_table
import torch
from evaluate import difference, summary


def test_accuracy_and_its_standard_error() -> None:
    hits = torch.tensor([True] * 75 + [False] * 25)
    assert summary(hits) == {"accuracy": 75.0, "stderr": pytest.approx(4.33)}


def test_paired_difference_ignores_what_both_know() -> None:
    """Three gained, one lost, of 100: 2 points, with the error of +1, -1 and 0."""
    others = torch.tensor([False] * 3 + [True] * 97)
    hits = torch.tensor([True] * 3 + [False] + [True] * 96)
    error = ((4 / 100 - 0.02**2) / 100) ** 0.5
    expected = {"difference": 2.0, "stderr": pytest.approx(100 * error, abs=0.01)}
    assert difference(hits, others) == expected
    assert difference(others, others) == {"difference": 0.0, "stderr": 0.0}


def test_readme_quotes_the_committed_results(example) -> None:
    readme = (example / "README.md").read_text()
    assert "| `where` |" in readme
    assert readme_table.rendered(readme) == readme, "run: python readme_table.py"
