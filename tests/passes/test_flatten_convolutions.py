from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gracec import ir
from gracec.ir.program import Program
from gracec.journal import Note
from gracec.module import capture_module
from gracec.passes import run_passes
from gracec.passes.flatten_convolutions import (
    CONVOLUTIONS,
    FLAT_CONVOLUTION,
    FlattenConvolutions,
)
from tests.nets import conv_net
from tests.rewrites import graph_of, reasons

Golden = Callable[..., None]
IMAGES = {"x": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture_module(conv_net(), IMAGES, {"x": {0: "batch_size"}})


def test_golden(captured: Program, golden: Golden) -> None:
    flat = run_passes(captured, [FlattenConvolutions()]).program
    text, model = ir.diff(captured, flat) + "\n", "conv_net() of tests/nets.py"
    golden("flatten-convolutions/convnet.txt", text, made_by=FlattenConvolutions(), model=model)


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
    assert result.notes == (Note("flatten-convolutions", "3 convolutions"),)
    result.program.save(f"{tmp_path}/net.pt2")
    loaded = Program.load(f"{tmp_path}/net.pt2")
    assert len(list(loaded.nodes(FLAT_CONVOLUTION))) == 3
    assert torch.equal(loaded(**IMAGES)[0], captured(**IMAGES)[0])


W = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))


REFUSED: list[tuple[Callable[..., Tensor], Tensor, str]] = [
    (
        lambda x, weight: functional.conv2d(x, weight, padding="same"),
        W,
        "the padding is given as text, 'same'",
    ),
    (
        lambda x, weight: functional.conv1d(x[:, :, 0], weight, padding="same"),
        W[..., 0],
        "the padding is given as text, 'same'",
    ),
    (
        lambda x, weight: functional.conv1d(x[:, :, 0], weight),
        W[..., 0],
        "aten.conv1d has no form with a matrix, aten.conv2d has",
    ),
    (
        lambda x, weight: functional.conv3d(x[:, :, None], weight),
        W[:, :, None],
        "aten.conv3d has no form with a matrix, aten.conv2d has",
    ),
    (
        lambda x, weight: functional.conv_transpose2d(x, weight),
        W.transpose(0, 1),
        "aten.conv_transpose2d.input has no form with a matrix, aten.conv2d has",
    ),
    (
        lambda x, weight: functional.conv2d(x, weight * 2),
        W,
        "the weight is no parameter, but aten.mul.Tensor",
    ),
    (
        lambda x, weight: functional.conv2d(weight, x[..., :3, :3].abs()),
        W,
        "the weight is no parameter, but aten.abs",
    ),
    (
        lambda x, weight: functional.conv2d(x, x) * weight.sum(),
        W,
        "the weight is no parameter, but an input",
    ),
    (
        lambda x, weight: functional.conv2d(x, weight) + weight.abs().mean(),
        W,
        "aten.abs reads the weight as well",
    ),
    (
        lambda x, weight: (
            functional.conv2d(x, weight) * functional.conv2d(weight, x[..., :3, :3]).sum()
        ),
        W,
        "aten.conv2d reads the weight as well",
    ),
]


@pytest.mark.parametrize(("compute", "weight", "reason"), REFUSED)
def test_a_convolution_of_another_kind_stays(
    compute: Callable[..., Tensor], weight: Tensor, reason: str
) -> None:
    program = graph_of(compute, weight.contiguous(), IMAGES)
    assert reason in reasons(program, CONVOLUTIONS)
    result = FlattenConvolutions().run(program)
    assert not result.modified and not list(result.program.nodes(FLAT_CONVOLUTION))
    first, *_, last = result.notes
    assert reason in first and last == "0 convolutions"


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, weight: functional.conv2d(x, weight) + functional.conv2d(x + 1, weight),
        lambda x, weight: functional.conv2d(x, weight) * functional.conv2d(x, weight).sum(),
    ],
)
def test_convolutions_may_share_a_weight(compute: Callable[..., Tensor]) -> None:
    program = graph_of(compute, W, IMAGES)
    result = FlattenConvolutions().run(program)
    assert result.notes == ("2 convolutions",)
    assert torch.equal(result.program(**IMAGES)[0], program(**IMAGES)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_no_padding_by_name_keeps_the_other_sizes(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 8, 3, padding="valid", stride=2, dilation=(1, 2), bias=bias)
    captured = capture_module(net, {"input": IMAGES["x"]})
    result = run_passes(captured, [FlattenConvolutions()])
    assert result.notes == (Note("flatten-convolutions", "1 convolutions"),)
    assert torch.equal(result.program(input=IMAGES["x"])[0], net(IMAGES["x"]))
