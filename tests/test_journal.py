"""Figures say what passed against what, and come back from JSON as they were."""

import json
from typing import Any

import pytest

from gracec.journal import (
    Agreement,
    Equal,
    Error,
    Figure,
    Journal,
    Kernels,
    Note,
    Unbound,
    figure_of,
    figure_to_dict,
)

FIGURES = [
    (Equal(3, "batches"), "equal bits, 3 batches"),
    (Error(1e-7, 1e-5, "of the largest output"), "1e-07 of the largest output, at most 1e-05"),
    (Kernels(14, 14), "14 of 14 planned"),
    (
        Agreement(0.25, 1.0, 0.5, bound=0.5),
        "KL 0.25 nats, at most 0.5; top-1 1, 0.5 without near-ties",
    ),
    (Agreement(0.25, 1.0, 0.5), "KL 0.25 nats; top-1 1, 0.5 without near-ties"),
    (Unbound({"kl": 0.25}), "kl 0.25"),
    (Unbound(True), "True"),
]


@pytest.mark.parametrize(("figure", "text"), FIGURES)
def test_a_figure_and_its_text(figure: Figure, text: str) -> None:
    assert str(figure) == text
    assert figure_of(json.loads(json.dumps(figure_to_dict(figure)))) == figure


@pytest.mark.parametrize("saved", [3, 0.5, True, {"kl": 0.1}, {"kind": "unknown", "x": 1}])
def test_figures_of_before_have_no_bound(saved: object) -> None:
    assert figure_of(saved) == Unbound(saved)


def test_notes_know_who_says_them() -> None:
    journal = Journal()
    journal.note("freeze", "one", "two")
    journal.extend([Note("", "three")])
    assert [str(note) for note in journal.notes] == ["freeze: one", "freeze: two", "three"]
    assert Note.of("freeze: one") == Note("", "freeze: one")
    assert Note.of({"source": "freeze", "text": "one"}) == journal.notes[0]


@pytest.mark.parametrize("saved", [{"kind": ["equal"], "count": 3}, {"kind": {}}, {"kl": "x"}, []])
def test_a_figure_of_no_known_kind_is_shown_as_it_is(saved: Any) -> None:
    figure = figure_of(saved)
    assert figure == Unbound(saved)
    assert "\n" not in str(figure)
