import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from gracec.errors import GracecError, PassError
from gracec.passes import Pass, PassResult, all_passes, parse_pipeline, run_passes
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.program import Program, annotate


def test_a_pipeline_parses_from_text() -> None:
    passes = parse_pipeline(
        "analyze-modality, plan-quantization{recipe=w4a16-ptq strict=true},"
        "insert-fake-quant{candidates=8 lowest=0.5}"
    )
    assert [item.name for item in passes] == [
        "analyze-modality",
        "plan-quantization",
        "insert-fake-quant",
    ]
    assert passes[1] == PlanQuantization(recipe="w4a16-ptq", strict=True)
    assert passes[2] == InsertFakeQuant(candidates=8, lowest=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("analyse-modality", "unknown pass 'analyse-modality'; did you mean 'analyze-modality'?"),
        ("insert-fake-quant{candidate=8}", "did you mean 'candidates'?"),
        ("insert-fake-quant{candidates=many}", "insert-fake-quant.candidates: 'many' is not a int"),
        ("apply-codes{weights=x}", "option 'weights' of apply-codes cannot be given as text"),
        ("insert-observers{samples=x}", "option 'samples' of insert-observers cannot be given"),
        ("freeze{", "cannot read the pipeline"),
        ("", "cannot read the pipeline"),
    ],
)
def test_a_bad_pipeline_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(GracecError) as error:
        parse_pipeline(text)
    assert message in str(error.value)


def test_every_pass_has_a_name_and_is_found_under_it() -> None:
    found = all_passes()
    assert {"analyze-modality", "plan-quantization", "freeze", "lower-torchao"} <= found.keys()
    assert all(cls.name == name for name, cls in found.items())


def test_a_pass_defined_elsewhere_is_found_under_its_name() -> None:
    assert parse_pipeline("mark{text=x}") == [Mark("x")]


@dataclass(frozen=True)
class Mark(Pass):
    text: str = ""
    name: ClassVar[str] = "mark"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        node = next(iter(program.graph.nodes))
        return PassResult(program, annotate(node, mark=self.text), (f"marked {self.text}",))

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
    assert result.notes == ("mark: marked b", "mark: marked a", "mark: marked a")
    assert result.modified
    assert not any("custom" in node.meta and node.meta["custom"] for node in captured.graph.nodes)


def test_a_broken_postcondition_is_an_error_with_its_reason(captured: Program) -> None:
    with pytest.raises(PassError, match="here: mark: bad mark; mark well"):
        run_passes(captured, [Mark("bad")])


def test_passes_are_listed_without_transformers() -> None:
    """Importing it takes seconds, which a command that only lists passes need not wait for."""
    script = "import sys, gracec.passes; gracec.passes.all_passes(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    names = loaded.stdout.decode().split()
    assert "gracec.passes.select_supervised" in names
    assert "transformers" not in names
