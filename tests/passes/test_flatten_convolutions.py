from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracec import ir
from gracec.module import capture_module
from gracec.passes import run_passes
from gracec.passes.flatten_convolutions import CONVOLUTION, FLAT_CONVOLUTION, FlattenConvolutions
from gracec.program import Program
from tests.nets import conv_net

Golden = Callable[[str, str], None]
IMAGES = {"x": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture_module(conv_net(), IMAGES, {"x": {0: "batch_size"}})


def test_golden(captured: Program, golden: Golden) -> None:
    flat = run_passes(captured, [FlattenConvolutions()]).program
    golden("flatten-convolutions/convnet.txt", ir.diff(captured, flat) + "\n")


def test_numerics_gradients_and_memory_are_those_of_the_convolution(captured: Program) -> None:
    flat = run_passes(captured, [FlattenConvolutions()]).program
    results = []
    for program in (captured, flat):
        program.graph_module.zero_grad(set_to_none=True)
        (logits,) = program(**IMAGES)
        logits.square().sum().backward()
        names = {
            program.fqn(str(n.target)): str(n.target)
            for n in program.graph.find_nodes(op="get_attr")
        }
        gradients = {name: program.tensor(target).grad for name, target in names.items()}
        results.append((logits, {n: g.flatten() for n, g in gradients.items() if g is not None}))
    (logits, expected), (others, found) = results
    assert torch.equal(logits, others) and expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-5, atol=1e-6), name
    weights = [p.tensor("first.weight") for p in (captured, flat)]
    assert weights[0].data_ptr() == weights[1].data_ptr() and weights[1].shape == (16, 27)


def test_twice_is_once_and_it_saves(captured: Program, tmp_path: object) -> None:
    result = run_passes(captured, [FlattenConvolutions()])
    again = run_passes(result.program, [FlattenConvolutions()])
    assert result.modified and not again.modified
    assert result.notes == ("flatten-convolutions: 3 convolutions",)
    result.program.save(f"{tmp_path}/net.pt2")
    loaded = Program.load(f"{tmp_path}/net.pt2")
    assert len(list(loaded.nodes(FLAT_CONVOLUTION))) == 3
    assert torch.equal(loaded(**IMAGES)[0], captured(**IMAGES)[0])


class Shared(nn.Module):
    """A weight that is convolved with, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x) + self.convolution.weight.abs().mean()


def test_a_weight_that_is_read_otherwise_stays() -> None:
    program = capture_module(Shared(), IMAGES)
    result = run_passes(program, [FlattenConvolutions()])
    assert not result.modified and len(list(result.program.nodes(CONVOLUTION))) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_no_padding_by_name_keeps_the_other_sizes(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 8, 3, padding="valid", stride=2, dilation=(1, 2), bias=bias)
    captured = capture_module(net, {"input": IMAGES["x"]})
    result = run_passes(captured, [FlattenConvolutions()])
    assert result.notes == ("flatten-convolutions: 1 convolutions",)
    assert torch.equal(result.program(input=IMAGES["x"])[0], net(IMAGES["x"]))
