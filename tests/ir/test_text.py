import subprocess
import sys

from gracec import ir
from gracec.capture import capture
from gracec.ir.program import Program
from tests.tiny import tiny_llava

PRINT = """
from gracec import ir
from gracec.capture import capture
from tests.tiny import tiny_llava
print(ir.format(capture(tiny_llava(tie=True))), end="")
"""


def test_equal_graphs_print_equal_text_in_another_process(captured: Program) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRINT],
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == ir.format(captured)


def test_text_depends_on_the_graph_and_not_on_the_weights(captured: Program) -> None:
    assert ir.format(capture(tiny_llava(seed=5, tie=True))) == ir.format(captured)
    assert ir.format(captured.copy()) == ir.format(captured)


def test_the_lines_say_what_a_reader_needs(captured: Program) -> None:
    lines = ir.format(captured).splitlines()
    assert lines[0] == "program llava f32 cpu"
    assert "input %pixel_values : f32[s3, 3, 32, 32]" in lines
    assert lines[-1].startswith("output logits = %linear_")
    q_proj = "@model.language_model.layers.0.self_attn.q_proj.weight:f32[64, 64]"
    assert sum(q_proj in line for line in lines) == 1


def test_diff_shows_only_what_changed(captured: Program) -> None:
    assert ir.diff(captured, captured.copy()) == ""
    changed = captured.copy()
    node = next(iter(changed.nodes(op_named(changed, "masked_scatter"))))
    node.meta["custom"] = {"gracec": {"role": "merge"}}
    lines = [line for line in ir.diff(captured, changed).splitlines() if line[0] in "+-"]
    assert len(lines) == 2
    assert lines[1].endswith("{role=merge}")


def op_named(program: Program, name: str) -> object:
    return next(node.target for node in program.graph.nodes if name in str(node.target))
