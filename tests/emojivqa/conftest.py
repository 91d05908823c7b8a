"""Make `examples/emojivqa` importable for the tests of this folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emojivqa"
sys.path.insert(0, str(EXAMPLE))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from more; threads that share a core wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def example() -> Path:
    return EXAMPLE
