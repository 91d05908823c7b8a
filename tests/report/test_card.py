"""Names and texts of others are in the card as what they are: no markup, no HTML, no commands."""

import re
import shlex
from typing import Any

import pytest
import yaml

from gracec.backends.base import CardFacts
from gracec.report import Report
from gracec.report.card import model_card
from gracec.report.page import render_page

HOSTILE = "a\n---\nlicense: evil\n<script>alert(1)</script> `x` [l](http://evil) | $x$ ![i](j)"
FACTS = CardFacts("compressed-tensors", "tested", "weights")


def hostile_report() -> Report:
    recipe = {"name": HOSTILE, "description": "a\n```\n<script>\n````", "weights": {}}
    return Report(recipe, (), (), {}, {"float32": 4, "bfloat16": 2, "compiled": 1})


def test_a_card_shows_names_and_runs_nothing() -> None:
    card = model_card(hostile_report(), FACTS, source=HOSTILE, form="hf")
    _, front, text = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    outside, inside, fence = [], [], ""
    for line in text.splitlines():
        if not fence and line.startswith("```"):
            fence = line[: len(line) - len(line.lstrip("`"))]
        elif fence and line.strip() == fence:
            fence = ""
        else:
            (inside if fence else outside).append(line)
    assert not fence
    rest = "\n".join(line for line in outside if not line.startswith("    "))
    assert "<script" not in rest and not re.search(r"(?<!\\)\]\(", rest)
    assert not re.search(r"^---", rest, re.MULTILINE)
    assert "license: evil" in rest  # as a part of the name
    assert any("<script>" in line for line in inside)
    (command,) = [line for line in outside if line.startswith("    gracec compile")]
    words = shlex.split(command)
    assert len(words) == 9 and words[2].startswith(r"a\n---\nlicense")


@pytest.mark.parametrize("name", ["model", "maker/model-1.5_b"])
def test_an_ordinary_name_is_itself(name: str) -> None:
    report = Report({"name": "mine", "weights": {}}, (), (), {}, {})
    card = model_card(report, FACTS, source=name, form="hf")
    assert f"\n{name}, compiled by gracec" in card
    assert f"    gracec compile {name} --recipe mine.yaml --format hf --out DIR" in card


def test_the_card_says_what_codes_were_chosen_by(corrected: Report) -> None:
    def made(report: Report) -> str:
        card = model_card(report, FACTS, source="m", form="hf")
        return card.partition("## Data and accuracy\n\n")[2].partition(" Its accuracy")[0]

    def recipe(**fields: Any) -> Report:
        return Report({"name": "mine", "weights": {}, **fields}, (), (), {}, {})

    assert made(corrected) == (
        "Scales and codes were calibrated on data: output error on held-out inputs: median 0.3 of "
        "plain rounding's, worst 0.9; logits KL 0.0079 nats against 0.049."
    )
    assert made(recipe()) == "No data was used to quantize it."
    assert made(recipe(activations={"vision": None})) == "No data was used to quantize it."
    assert made(recipe(activations={"vision": {}})) == "No data was used to quantize it."
    observed = recipe(activations={"vision": {"bits": 8}})
    assert made(observed) == "Scales were calibrated on data."
    assert "second moments" in made(recipe(calibration={"method": "moments"}))


def test_a_page_shows_names_and_runs_nothing() -> None:
    page = render_page({HOSTILE: hostile_report()}, HOSTILE)
    assert "<script" not in page and "&lt;script&gt;" in page
