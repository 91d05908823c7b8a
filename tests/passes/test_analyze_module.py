from collections.abc import Callable

import pytest
import torch
from torch import nn

from gracec import ir
from gracec.errors import PassError
from gracec.ir.program import Program, annotation
from gracec.module import capture_module
from gracec.passes import run_passes
from gracec.passes.analyze_module import AnalyzeModule
from gracec.passes.flatten_convolutions import FlattenConvolutions
from tests.nets import conv_net

Golden = Callable[..., None]


def captured() -> Program:
    program = capture_module(conv_net(), {"x": torch.randn(2, 3, 16, 16)})
    return run_passes(program, [FlattenConvolutions()]).program


def test_golden(golden: Golden) -> None:
    program = captured()
    analyzed = run_passes(program, [AnalyzeModule()]).program
    golden(
        "analyze-module/convnet.txt",
        ir.diff(program, analyzed) + "\n",
        made_by=AnalyzeModule(),
        after="flatten-convolutions",
        model="conv_net() of tests/nets.py",
    )


def test_readers_of_one_activation_are_a_set() -> None:
    net = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    program = capture_module(net, {"query": x, "key": x, "value": x})
    result = run_passes(program, [AnalyzeModule()])
    found = [annotation(n) for n in result.program.graph.nodes if "part" in annotation(n)]
    assert {notes["part"] for notes in found} == {"module"} and result.modified
    assert not run_passes(result.program, [AnalyzeModule()]).modified
    sets = [
        annotation(n)["fused_set"]
        for n in run_passes(captured(), [AnalyzeModule()]).program.nodes(part="module")
    ]
    assert sets == [0, 1, 2, 3]


def test_without_a_weight_it_refuses() -> None:
    program = capture_module(nn.BatchNorm1d(4).eval(), {"input": torch.randn(3, 4)})
    with pytest.raises(PassError, match="no matmul and no convolution has a weight"):
        run_passes(program, [AnalyzeModule()])
