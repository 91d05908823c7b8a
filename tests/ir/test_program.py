import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.errors import GracecError
from gracec.ir.program import Program, annotate, annotation
from gracec.passes import parse_pipeline, run_passes


def test_a_copy_has_its_own_graph_and_the_same_tensors(
    captured: Program, batch: dict[str, Tensor]
) -> None:
    copy = captured.copy()
    merge = next(node for node in copy.graph.nodes if "masked_scatter" in str(node.target))
    annotate(merge, role="merge")
    assert not any(annotation(node) for node in captured.graph.nodes)
    target = "model.lm_head.weight"
    assert copy.tensor(target) is captured.tensor(target)
    copy.set_tensor("model.lm_head.extra", torch.zeros(1))
    with pytest.raises(AttributeError):
        captured.tensor("model.lm_head.extra")
    assert torch.equal(copy(**batch)[0], captured(**batch)[0])


def test_a_tied_head_carries_both_names(captured: Program) -> None:
    assert captured.fqns["model.lm_head.weight"] == (
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    )


def test_annotations_survive_reexport(captured: Program) -> None:
    program = captured.copy()
    merge = next(node for node in program.graph.nodes if "masked_scatter" in str(node.target))
    annotate(merge, role="merge", modality="fused")
    exported = program.reexport()
    found = {str(n.target): annotation(n) for n in exported.graph.nodes if annotation(n)}
    assert found == {"aten.masked_scatter.default": {"role": "merge", "modality": "fused"}}


@pytest.mark.parametrize(
    "pipeline",
    [
        "analyze-modality,plan-quantization,insert-fake-quant,insert-taps,select-supervised",
        "analyze-modality,plan-quantization,insert-fake-quant,freeze",
    ],
)
def test_a_saved_program_is_the_same_program(
    after: Callable[[str], Program], batch: dict[str, Tensor], pipeline: str, tmp_path: Path
) -> None:
    program = after(pipeline)
    program.save(tmp_path / "program.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["program.pt2"]
    again = Program.load(tmp_path / "program.pt2")
    assert ir.diff(Program.load(tmp_path / "program.pt2"), again) == ""
    strip_shapes = re.compile(r" : .*?(?=  {|$)", re.M)  # re-export may rename symbolic sizes
    assert strip_shapes.sub("", ir.format(again)) == strip_shapes.sub("", ir.format(program))
    inputs = dict(batch)
    if "supervised_index" in program.example_inputs:
        inputs["supervised_index"] = torch.tensor([3, 8, 20])
    for found, expected in zip(again(**inputs), program(**inputs), strict=True):
        assert torch.equal(found, expected)
    assert again.fqns == {k: v for k, v in program.fqns.items() if k in again.fqns}
    assert run_passes(again, parse_pipeline("analyze-modality")).program.output_names


@pytest.mark.parametrize(
    "said", ['"use_pickle" :  1', '"use\\u005fpickle": true', '"a": [{"use_pickle": 1}]']
)
def test_pickles_are_refused_however_it_is_written(said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/extra/gracec.json", "{}")
        archive.writestr("x/data/weights/model_weights_config.json", f"{{{said}}}")
    with pytest.raises(GracecError, match="pickled objects, which are never loaded"):
        Program.load(path)


@pytest.mark.parametrize(("name", "content"), [("extra/gracec.json", "{"), ("a.json", "[" * 10**5)])
def test_a_broken_archive_is_one_line(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/extra/gracec.json", content if name == "extra/gracec.json" else "{}")
        archive.writestr(f"x/{name}.json", content)
    with pytest.raises(GracecError, match="x.pt2: (not readable|lists and objects)") as error:
        Program.load(path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_program_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with pytest.raises(GracecError, match="not readable as a program"):
        Program.load(path)
    path.write_bytes(b"PK")
    with pytest.raises(GracecError, match="not readable as a program"):
        Program.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/config.json", '{"use_pickle": true}')
    with pytest.raises(GracecError, match="not a program saved by gracec"):
        Program.load(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/extra/gracec.json", "{}")
    with pytest.raises(GracecError, match="pickled objects, which are never loaded"):
        Program.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/extra/gracec.json", "{}")
    with pytest.raises(GracecError, match="not readable as a program"):
        Program.load(path)


def test_a_lowered_program_is_not_saved(after: Callable[[str], Program], tmp_path: Path) -> None:
    pipeline = "analyze-modality,plan-quantization,insert-fake-quant,freeze,lower-torchao"
    with pytest.raises(GracecError, match="a lowered program cannot be saved"):
        after(pipeline).save(tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_annotate_says_whether_it_changed_something(captured: Program) -> None:
    node = next(iter(captured.copy().graph.nodes))
    assert annotate(node, role="x")
    assert not annotate(node, role="x")
    assert annotate(node, role=None)
    assert "custom" not in node.meta or not annotation(node)


def test_inputs_that_do_not_fit_are_named(captured: Program, batch: dict[str, Tensor]) -> None:
    with pytest.raises(GracecError, match=r"missing \['pixel_values'\]"):
        captured(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(GracecError, match=r"unknown \['labels'\]"):
        captured(**batch, labels=batch["input_ids"])


def test_a_query_that_finds_nothing_says_so(captured: Program) -> None:
    with pytest.raises(GracecError, match="0 nodes of the graph carry"):
        captured.node(role="merge")
