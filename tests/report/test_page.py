"""The HTML report: whole, self-contained, and true to the reports it is made from."""

import base64
import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.backends.base import CardFacts
from gracec.compiled import CompiledModel
from gracec.errors import GracecError
from gracec.evaluate import load_samples
from gracec.journal import Note
from gracec.report.card import model_card
from gracec.report.page import _output_errors, render_page
from gracec.report.report import SQNR_NOTE, Report
from gracec.reporting import write_report_page
from gracec.training.curve import Curve
from tests.tiny import tiny_image, tiny_processor

SCORE = {"n": 9, "standard_error": 0.1, "blind_accuracy": 0.2, "majority": 0.3}


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data

    def pictures(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.partition("base64,")[2]) for source in sources]


@pytest.fixture(scope="module")
def trained(
    llava: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A folder of four questions, and an artifact that was trained and examined on it."""
    root = tmp_path_factory.mktemp("page")
    folder = root / "data"
    folder.mkdir()
    lines = []
    for number in range(4):
        tiny_image(number).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "question": "what color is <this> ?", "answer": "red"}
        lines.append(json.dumps({**line, "type": "color"}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    training = {"steps": 3, "batch_size": 2, "micro_batch_size": 2, "lr": 3e-3}
    weights = {"decoder": {"group_size": 32}}
    fields = {"name": "t", "weights": weights, "training": training}
    recipe = gracec.Recipe.from_dict({**fields, "calibration": {"method": "weights"}})
    gracec.compile(
        llava,
        recipe,
        train_data=folder,
        eval_data=folder,
        processor=tiny_processor(),
        output_dir=root / "trained",
        progress=False,
    )
    return folder, root / "trained"


def accurate(report: Report, share: float) -> Report:
    scores = {
        name: {
            "overall": {**SCORE, "accuracy": value},
            "types": {"color": {**SCORE, "accuracy": value}},
        }
        for name, value in (("original", 0.5), ("compiled", share))
    }
    found = {"data": "data", "difference": {"difference": share - 0.5, "standard_error": 0.1}}
    return dataclasses.replace(report, accuracy={**found, **scores})


def test_it_needs_nothing_else(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, artifact = trained
    write_report_page([artifact], tmp_path / "report.html", load_samples(folder))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "http" not in page.words and "url(" not in text
    for picture in page.pictures():
        assert picture.startswith((b"<?xml", b"\x89PNG"))
    assert not [path for path in tmp_path.iterdir() if path.name != "report.html"]


def test_it_says_what_the_report_says(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, artifact = trained
    write_report_page([artifact], tmp_path / "report.html", load_samples(folder))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    report = gracec.load(artifact).report
    assert report.sizes_line() in page.words and report.accuracy_line() in page.words
    for note in report.notes:
        assert str(note) in page.words
    for gate in report.gates:
        assert gate.replace("_", " ") in page.words
    for row in report.plan:
        if row.spec is not None:
            assert row.fqns[0] in page.words
    assert "steps: 3" in page.words and "group_size: 32" in page.words
    assert "Answered wrongly" in page.words and "what color is <this> ?" in page.words
    drawings = [picture for picture in page.pictures() if picture.startswith(b"<?xml")]
    assert len(drawings) == 2  # the training, and the noise of the weights
    rows = [row for row in report.plan if row.spec is not None]
    assert all(row.ptq_sqnr_db > 10 for row in rows)


def test_without_training_and_questions_it_is_shorter(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    page = Page(render_page({"out": compiled.report}, ""))
    assert "Not measured when the model was compiled." in page.words
    assert len(page.pictures()) == 1
    assert not any("ptq_sqnr_db" in row.to_dict() for row in compiled.report.plan)


def test_corrected_codes_are_drawn_and_explained(
    corrected: Report, compiled: CompiledModel
) -> None:
    page, other = (Page(render_page({"out": one}, "")) for one in (corrected, compiled.report))
    assert len(page.pictures()) == len(other.pictures()) + 1
    assert corrected.output_error_line() in page.words and SQNR_NOTE in page.words
    assert "corrected logits" in page.words and "0.0006, rounded" in page.words
    drawn = {attributes.get("alt") for tag, attributes in page.tags if tag == "img"}
    assert "Error of the output of every weight, before and after its codes were corrected" in drawn
    assert "SQNR does not say" not in other.words


def test_every_weight_is_drawn_where_it_is(corrected: Report) -> None:
    figure = Figure()
    _output_errors(figure, corrected)
    (axes,) = figure.axes
    plain, searched, compiled = (line.get_ydata() for line in axes.lines)
    assert axes.get_yscale() == "log"
    assert plain == pytest.approx([number / 1000 for number in range(2, 15)])
    assert searched == pytest.approx([0.8 * one for one in plain])
    assert compiled == pytest.approx([*(0.3 * one for one in plain[:-1]), 0.9 * 0.014])
    assert len(axes.get_xticklabels()) == 13


def test_errors_of_nothing_are_not_drawn(corrected: Report) -> None:
    """No logarithm of 0, which a report of others may hold."""
    rows = [dataclasses.replace(row, output_error=(0.0, 0.0, 0.0)) for row in corrected.plan]
    page = Page(render_page({"out": dataclasses.replace(corrected, plan=tuple(rows))}, ""))
    assert "output error on" not in page.words


def test_several_artifacts_are_compared(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, artifact = trained
    again = tmp_path / artifact.name
    again.symlink_to(artifact)  # the same name twice, so that paths tell them apart
    write_report_page([artifact, again], tmp_path / "report.html", load_samples(folder))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert f"{artifact} is right and another is wrong: 0 of 4" in page.words
    assert len(page.pictures()) == 3


def test_what_others_wrote_is_text(compiled: CompiledModel) -> None:
    report = dataclasses.replace(compiled.report, notes=(Note("", "<script>alert(1)</script>"),))
    text = render_page({"<b>": accurate(report, 0.4)}, '"><img src=x>')
    assert "<script>" not in text and "<b>," not in text and "src=x>" not in Page(text).tags
    assert "<script>alert(1)</script>" in Page(text).words
    assert "40.0% ±10.0%" in Page(text).words


@pytest.mark.parametrize("best", [0, None])
@pytest.mark.parametrize("chosen_by", ["held_out_loss", "held_out_kl"])
def test_what_chose_a_state_is_drawn_beside_the_candidate(
    best: int | None, chosen_by: str, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[tuple[str, list[str]]] = []
    save = Figure.savefig

    def watched(figure: Figure, *arguments: Any, **options: Any) -> None:
        axes = figure.axes[2] if len(figure.axes) > 2 else figure.axes[0]
        drawn.append((axes.get_title(), axes.get_legend_handles_labels()[1]))
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    curve = Curve(
        rows=[{"step": 1, "ce": 1.0, "beta": 0.5}],
        held_out=[{"step": 0, chosen_by: 2.0}, {"step": 1, chosen_by: None}],
        best_step=best,
        candidate={chosen_by: 1.5},
        chosen_by=chosen_by,
    )
    report = dataclasses.replace(compiled.report, training=curve.to_dict())
    render_page({"out": report}, "m")
    words = "cross-entropy" if chosen_by == "held_out_loss" else "KL to the teacher"
    labels = ["calibrated, kept"] if best is None else ["kept", "calibrated"]
    assert (f"{words}, held out", labels) in drawn
    card = model_card(report, CardFacts("a", "b", "c"), source="m", form="hf")
    kept = "of which the state after step 0 was kept"
    if best is None:
        kept = "after none of which it was better than by calibration alone, which was kept"
    assert f"Trained for 1 optimizer steps, {kept}." in card


def test_equal_reports_give_equal_pages(compiled: CompiledModel) -> None:
    reports: dict[str, Any] = {"a": accurate(compiled.report, 0.4), "b": compiled.report}
    assert render_page(reports, "m") == render_page(reports, "m")


def test_bad_input_is_one_line(compiled: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(GracecError, match="gracec.json"):
        write_report_page([tmp_path], tmp_path / "report.html")
    compiled.save_pretrained(tmp_path / "out", ())
    with pytest.raises(GracecError, match="cannot be written"):
        write_report_page([tmp_path / "out"], tmp_path / "none" / "report.html")
