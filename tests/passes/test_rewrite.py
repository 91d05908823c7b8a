import torch
from torch import Tensor, fx

from gracec import ir
from gracec.ir.program import Program
from gracec.passes.rewrite import Kept, Mismatch, Rewrite, described, rewrite
from gracec.passes.strip import drop_dead
from tests.rewrites import graph_of

aten = torch.ops.aten


def is_abs(node: fx.Node) -> bool:
    return node.target == aten.abs.default


def of_relu(node: fx.Node) -> fx.Node:
    (x,) = node.all_input_nodes
    if x.target != aten.relu.default:
        raise Mismatch(f"it is of {described(x)}")
    return x


def take(program: Program, node: fx.Node, x: fx.Node) -> None:
    node.replace_all_uses_with(x)


ABS = Rewrite("absolute value", is_abs, of_relu, take)
"""abs(relu(x)) -> relu(x)"""


def chain(x: Tensor, weight: Tensor) -> Tensor:
    first = x.relu().abs().abs()
    return first + x.abs() + weight.abs() + x.sin().abs() + x.cos().abs() + x.sin().abs()


def test_each_candidate_is_rewritten_or_has_a_reason() -> None:
    program = graph_of(chain, torch.ones(1), {"x": torch.tensor([-1.0, 2.0])})
    before, copied = ir.format(program), program.copy()
    done = rewrite(copied, [ABS])
    drop_dead(copied)
    # The second of two that follow each other sees what the first has left.
    assert done.modified and done.counts == {"absolute value": 2}
    assert [kept.reason for kept in done.kept] == [
        "it is of an input",
        "it is of a parameter",
        "it is of aten.sin",
        "it is of aten.cos",
        "it is of aten.sin",
    ]
    assert done.kept[0] == Kept("absolute value", "abs_3", "it is of an input")
    assert done.refusals == [
        "1 absolute value stays as it is: it is of an input (abs_3)",
        "1 absolute value stays as it is: it is of a parameter (abs_4)",
        "2 absolute values stay as they are: it is of aten.sin (abs_5)",
        "1 absolute value stays as it is: it is of aten.cos (abs_6)",
    ]
    assert done.summary == "2 absolute values"
    again = rewrite(copied, [ABS])
    assert not again.modified and again.kept == done.kept
    assert ir.format(program) == before
    assert torch.equal(copied(**program.example_inputs)[0], program(**program.example_inputs)[0])


def test_what_an_operand_is() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    added = graph.call_function(aten.add.Tensor, (x, weight))
    item = graph.call_function(torch.ops.aten.split.Tensor, (added, 1))
    found = [described(value) for value in (x, weight, added, item, 2.0, None)]
    assert found == [
        "an input",
        "a parameter",
        "aten.add.Tensor",
        "aten.split.Tensor",
        "2.0",
        "None",
    ]
