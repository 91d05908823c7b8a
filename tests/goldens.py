"""The header of a golden file: what made it, so that anyone can make it again."""

from __future__ import annotations

import pytest
import transformers

GRAPHS_FROM = (5, 23)
"""Before, attention had an operator less."""

TWO_BLOCKS = "tiny_llava(tie=True)"
ONE_BLOCK = "tiny_llava(tie=True, num_hidden_layers=1)"
"""For passes that do the same to every block of the decoder."""


def header(made_by: object, after: str, model: str) -> str:
    """Three lines.

    Args:
        made_by: the pass with its options, as text.
        after: the pipeline that ran before it.
        model: how to make it, with `tests/tiny.py` where nothing else is said.
    """
    return f"// pass: {made_by}\n// after: {after or 'the capture'}\n// model: {model}\n"


INSTALLED = tuple(int(number) for number in transformers.__version__.split(".")[:2])


def same_graphs() -> None:
    """Skip a test of what is in a graph where transformers computes the same in other steps."""
    if INSTALLED < GRAPHS_FROM:
        first = ".".join(map(str, GRAPHS_FROM))
        pytest.skip(f"the graphs that are written down are those of transformers {first} and later")
