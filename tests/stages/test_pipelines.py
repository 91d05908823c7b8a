"""Further passes find their place in a pipeline of the compilation, or are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gracec import compiler
from gracec.compiler import compile, load
from gracec.errors import GracecError
from gracec.ir.program import Program, annotate, annotation
from gracec.passes import Pass, PassResult
from gracec.request import Request
from gracec.stages.pipelines import lowering_passes
from tests.tiny import tiny_llava, tiny_processor


@dataclass(frozen=True)
class Sign(Pass):
    """Leaves its words at the logits.

    Options: `words`, what it leaves.
    """

    words: str = "was here"
    name: ClassVar[str] = "sign"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        (output,) = program.graph.find_nodes(op="output")
        (logits,) = output.args[0][:1]
        if annotation(logits).get("signed") == self.words:
            return PassResult(program, False)
        annotate(logits, signed=self.words)
        return PassResult(program, True, (f"signed: {self.words}",))


def signature(program: Program) -> list[Any]:
    found = [annotation(node).get("signed") for node in program.graph.nodes]
    return [words for words in found if words]


def request(*passes: str, **options: Any) -> Request:
    return Request.checked(None, "w4a16-ptq", passes=passes, **options)


def test_what_is_placed_in_a_lowering_is_kept_with_the_codes() -> None:
    asked = request("sign after plan-quantization", "sign{words=late} after strip")
    assert lowering_passes(asked) == ("sign{words=late} after strip",)
    assert lowering_passes(request("sign before fuse-decoder", formats="onnx"))


@pytest.mark.parametrize(
    ("place", "options", "fix"),
    [
        ("after fuse-decoder", {}, "known: analyze-modality, apply-codes, freeze, "),
        ("after insert-taps", {}, "did you mean 'insert-fake-quant'?"),
        ("after strip", {"target": "onnxruntime"}, "known: analyze-modality, freeze, "),
        ("after sign", {}, "known: analyze-modality, "),
    ],
)
def test_a_pass_beside_one_that_does_not_run_is_refused_before_any_work(
    place: str, options: dict[str, Any], fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "quantize", lambda *_: pytest.fail("something was done"))
    anchor = place.split()[-1]
    with pytest.raises(GracecError) as error:
        compile("no-such-model", "w4a16-ptq", passes=[f"sign {place}"], **options)
    start = f"further pass sign {place}: there is no {anchor} in this compilation; "
    assert str(error.value).startswith(start + fix)


def test_an_artifact_lowers_with_the_further_passes_whenever_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_llava(num_hidden_layers=1)
    compiled = compile(
        model,
        "w4a16-ptq",
        processor=tiny_processor(),
        passes=["sign{words=lowered} after strip"],
        output_dir=tmp_path / "out",
        formats=(),
    )
    assert signature(compiled.program) == ["lowered"]
    assert "sign: signed: lowered" in map(str, compiled.report.notes)
    loaded = load(tmp_path / "out")
    assert loaded.frozen.passes == ("sign{words=lowered} after strip",)
    assert signature(loaded.program) == ["lowered"]
    loaded.save_pretrained(tmp_path / "again", formats=())
    assert signature(load(tmp_path / "again").program) == ["lowered"]
