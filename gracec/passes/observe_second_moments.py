"""observe-second-moments: watch what an error of each quantized weight would cost.

    linear(x, w) -> linear(second_moments(x), w)

An observer adds up the squares of the inputs of a linear, or of the patches that a convolution
sees, for each matrix of the weight. Linears that read the same activation share one. The samples
run at once; `insert-fake-quant` then weighs its search for scales by what was seen, and takes the
observers out. Random token ids and noise for pictures do: which features are large is a property of
the model more than of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from gracec.ir.matmul_rows import matmul_rows, matmul_shape, rows_operands
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import value
from gracec.passes.base import Pass, PassResult
from gracec.passes.insert_observers import run_observers
from gracec.quant.second_moments import SecondMoments

PREFIX = "second_moments"


class SecondMomentsObserver(nn.Module):
    """Returns its first argument, and remembers the mean squares of its rows.

    Args:
        target: operator that the rows are those of.
        parts: matrices of its weight.
        features: columns of each.
    """

    def __init__(self, target: Any, parts: int, features: int) -> None:
        super().__init__()
        self.target = target
        self.moments = SecondMoments(features, parts, full=False)
        self.watching = True

    def forward(self, x: Tensor, *how: Any) -> Tensor:
        if self.watching:
            if self.moments.sums.device != x.device:
                self.moments.sums = self.moments.sums.to(x.device)
            for part, rows in matmul_rows(self.target, x, how):
                self.moments.add(part, rows)
        return x

    @property
    def sums(self) -> Tensor:
        """[P, K]."""
        return self.moments.sums


@dataclass(frozen=True)
class ObserveSecondMoments(Pass):
    """Options: `samples`, prepared inputs of the graph; without them, the example inputs.

    A sample of text alone leaves out the inputs that are about images: nothing in the text depends
    on those of the example, which are not observed then.
    """

    samples: Sequence[Mapping[str, Tensor]] = field(default=())
    name: ClassVar[str] = "observe-second-moments"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if not any("quant" in annotation(node) for node in program.graph.nodes):
            raise self.refuse("no weight has a plan", fix="run plan-quantization first")

    def apply(self, program: Program) -> PassResult:
        if any(moment_observers(program)):
            return PassResult(program, False)
        found: dict[tuple[Any, ...], fx.Node] = {}
        for node in [node for node in program.graph.nodes if "quant" in annotation(node)]:
            key = (node.args[0], node.target, matmul_shape(node), str(rows_operands(node)))
            if key not in found:
                found[key] = self._insert(program, node)
            node.update_arg(0, found[key])
        program.recompile()
        samples = self.samples or [program.example_inputs]
        observers = dict(moment_observers(program))
        run_observers(program, observers, samples)
        on = f"{len(self.samples)} samples" if self.samples else "the example inputs"
        return PassResult(program, True, (f"{len(observers)} inputs observed on {on}",))

    @staticmethod
    def _insert(program: Program, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        target = f"{PREFIX}.{len(list(moment_observers(program)))}"
        observed = SecondMomentsObserver(node.target, *matmul_shape(node))
        program.graph_module.add_submodule(target, observed)
        with program.graph.inserting_before(node):
            observer = program.graph.call_module(target, (source, *rows_operands(node)))
        observer.meta = {"val": value(source)}
        observer.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
        annotate(observer, modality=annotation(source).get("modality"), observer=PREFIX)
        return observer


def moment_observers(program: Program) -> Iterator[tuple[fx.Node, SecondMomentsObserver]]:
    """The observers of a program with their nodes, in order."""
    for node in program.graph.find_nodes(op="call_module"):
        observer = program.graph_module.get_submodule(str(node.target))
        if isinstance(observer, SecondMomentsObserver):
            yield node, observer
