import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest

from gracec.errors import PassError
from gracec.ir.program import Program, annotate
from gracec.journal import Note
from gracec.passes import PASSES, Pass, PassResult, all_passes, parse_pipeline, run_passes


def test_every_pass_has_a_name_and_is_found_under_it() -> None:
    found = all_passes()
    assert {"analyze-modality", "plan-quantization", "freeze", "lower-torchao"} <= found.keys()
    assert all(cls.name == name for name, cls in found.items())


def test_a_pass_defined_elsewhere_is_found_under_its_name() -> None:
    assert parse_pipeline("mark{text=x}") == (Mark("x"),)
    assert PASSES.get("mark") is Mark


@dataclass(frozen=True)
class Mark(Pass):
    text: str = ""
    name: ClassVar[str] = "mark"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        node = next(iter(program.graph.nodes))
        return PassResult(program, annotate(node, mark=self.text), (f"marked {self.text}",))

    def requires(self, program: Program) -> None:
        if self.text == "never":
            raise self.refuse("nothing is ever marked")

    def ensures(self, before: Program, after: Program) -> None:
        if self.text == "bad":
            raise self.refuse("bad mark", where="here", fix="mark well")


def test_the_runner_keeps_order_reports_and_never_changes_its_input(captured: Program) -> None:
    seen: list[str] = []

    def observe(item: Pass, before: Program, result: PassResult) -> None:
        assert before is not result.program
        seen.append(result.notes[0])

    result = run_passes(captured, [Mark("b"), Mark("a"), Mark("a")], observe)
    assert seen == ["marked b", "marked a", "marked a"]
    marked = ("marked b", "marked a", "marked a")
    assert result.notes == tuple(Note("mark", text) for text in marked)
    assert [(run.item, run.modified) for run in result.runs] == [
        (Mark("b"), True),
        (Mark("a"), True),
        (Mark("a"), False),
    ]
    assert result.modified
    assert not any("custom" in node.meta and node.meta["custom"] for node in captured.graph.nodes)


def test_no_pass_changes_nothing(captured: Program) -> None:
    result = run_passes(captured, [])
    assert (result.program, result.modified, result.notes, result.runs) == (captured, False, (), ())


def test_each_run_has_its_time_and_what_operators_came_and_went(captured: Program) -> None:
    text = "analyze-modality,plan-quantization,insert-fake-quant,freeze"
    runs = run_passes(captured, parse_pipeline(text)).runs
    assert [run.item.name for run in runs] == text.split(",")
    assert all(run.seconds > 0 for run in runs)
    assert [run.operators for run in runs] == [
        Counter(),
        Counter(),
        Counter({"gracec.fake_quantize": 14}),
        Counter({"gracec.dequantize": 14, "gracec.fake_quantize": -14}),
    ]


def test_a_broken_postcondition_is_an_error_with_its_reason(captured: Program) -> None:
    with pytest.raises(PassError, match="here: mark: bad mark; mark well"):
        run_passes(captured, [Mark("bad")])


def test_a_broken_precondition_is_an_error_before_anything_is_done(
    captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mark, "apply", lambda *arguments: pytest.fail("marked"))
    with pytest.raises(PassError, match="mark: nothing is ever marked"):
        run_passes(captured, [Mark("never")])


def test_passes_are_listed_without_transformers() -> None:
    """Importing it takes seconds, which a command that only lists passes need not wait for."""
    script = "import sys, gracec.passes; gracec.passes.all_passes(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    names = loaded.stdout.decode().split()
    assert "gracec.passes.select_supervised" in names
    assert "transformers" not in names
