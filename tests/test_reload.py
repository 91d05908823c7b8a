"""What was saved is loaded by a fresh process, which has to compute what was compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gracec
from gracec import reload
from gracec.cli import app
from gracec.compiled import CompiledModel
from gracec.errors import GateError
from gracec.journal import Error
from gracec.models import ties
from gracec.recipe import Recipe
from gracec.targets.torchao import Torchao
from tests.models.test_ties import with_other_head
from tests.tiny import tiny_llava

WEIGHTS = {"decoder": {"group_size": 32}}
RECIPE = Recipe.from_dict({"name": "again", "weights": WEIGHTS, "deploy": {"dtype": "float32"}})


def test_the_figure_is_in_both_reports(tmp_path: Path) -> None:
    compiled = gracec.compile(
        tiny_llava(), RECIPE, output_dir=tmp_path / "out", formats=(), check_reload=True
    )
    figure = compiled.report.gates["reloaded_equals_compiled"]
    assert figure == Error(0.0, 1e-4, "of the largest logit, in a fresh process")
    loaded = gracec.load(tmp_path / "out")  # the manifest holds what was written after it
    assert loaded.report.to_dict() == compiled.report.to_dict()


def test_what_a_file_does_not_say_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of its own whose configuration says that it is the embedding."""
    monkeypatch.setattr(ties, "_say_untied", lambda model: None)
    with pytest.raises(GateError, match="in a fresh process: .*those that were compiled by"):
        gracec.compile(
            with_other_head(), RECIPE, output_dir=tmp_path / "out", formats=(), check_reload=True
        )
    assert not list(tmp_path.iterdir())  # nothing is put in place


def test_what_cannot_be_loaded_is_found(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path / "out", formats=())
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({**fields, "projector_hidden_act": "relu"})
    )
    with pytest.raises(GateError, match="cannot be used: .*config.json") as error:
        reload.reloaded_equals_compiled(
            tmp_path / "out", compiled.frozen, compiled.runtime, Torchao()
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "said", "expected"),
    [(None, None, True), (None, "0", False), (True, "0", True), (False, "1", False)],
)
def test_who_asks(
    asked: bool | None, said: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(reload.SWITCH)
    if said is not None:
        monkeypatch.setenv(reload.SWITCH, said)
    assert reload.wanted(asked) is expected


def test_a_target_of_this_process_alone_is_noted(tmp_path: Path) -> None:
    class Mine(Torchao):
        name = "mine"

    compiled = gracec.compile(
        *(tiny_llava(), RECIPE),
        target=Mine(),
        output_dir=tmp_path / "out",
        formats=(),
        check_reload=True,
    )
    assert "reloaded_equals_compiled" not in compiled.report.gates
    assert "not loaded again in a fresh process: Mine is known" in str(compiled.report.notes)


def test_the_command_has_the_switch(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compile(*_: object, check_reload: bool | None, **__: object) -> None:
        asked.append(check_reload)
        raise SystemExit(0)

    monkeypatch.setattr(gracec, "compile", compile)
    for flags in ((), ("--check-reload",), ("--no-check-reload",)):
        CliRunner().invoke(app, ["compile", str(saved), "--out", str(tmp_path / "out"), *flags])
    assert asked == [None, True, False]
