"""insert-observers: watch the inputs of linears whose activations the recipe quantizes.

    linear(x, w) -> linear(observer(x), w)

Linears that read the same activation share one observer. The observers are calibrated at once, on
the samples given; `insert-fake-quant` turns them into fake-quant nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gracec.ir.annotations import planned_act
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import value
from gracec.passes.base import Pass, PassResult
from gracec.quant.observers import OBSERVERS, ActivationSpec, Observer

PREFIX = "observers"


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Options: `samples`, prepared inputs of the graph; without them, the example inputs.

    A sample of text alone leaves out the inputs that are about images: the graph then sees the
    images of the example, which nothing in the text depends on, and they are not observed.
    """

    samples: Sequence[Mapping[str, Tensor]] = field(default=())
    name: ClassVar[str] = "insert-observers"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if not any("quant" in annotation(node) for node in program.graph.nodes):
            raise self.refuse("no weight has a plan", fix="run plan-quantization first")
        if not list(_observed_linears(program)):
            raise self.refuse(
                "the recipe quantizes no activations", fix="give the recipe `activations`"
            )

    def apply(self, program: Program) -> PassResult:
        observers: dict[tuple[fx.Node, ActivationSpec], fx.Node] = {}
        for linear in _observed_linears(program):
            source = linear.args[0]
            assert isinstance(source, fx.Node)
            if source in observer_nodes(program) or "act" in annotation(source):
                continue  # observed, or quantized already
            spec = planned_act(linear)
            if (source, spec) not in observers:
                observers[source, spec] = self._insert(program, linear, source, spec)
            linear.update_arg(0, observers[source, spec])
        if not observers:
            return PassResult(program, False)
        program.recompile()
        notes = [f"{len(observers)} activations observed on {len(self.samples)} samples"]
        samples = self.samples
        if not samples:
            notes = [
                f"{len(observers)} activations observed on the EXAMPLE inputs only: "
                "give calibration samples for scales that mean something"
            ]
            samples = [program.example_inputs]
        run_observers(program, {n: _observer(program, n) for n in observers.values()}, samples)
        return PassResult(program, True, tuple(notes))

    def ensures(self, before: Program, after: Program) -> None:
        for node in observer_nodes(after):
            if not _observer(after, node).seen:
                raise self.refuse(
                    f"{node.name} has observed nothing",
                    fix="calibrate on data with pictures, as the model will see",
                )

    def _insert(
        self, program: Program, linear: fx.Node, source: fx.Node, spec: ActivationSpec
    ) -> fx.Node:
        watched = value(source)
        assert watched is not None
        count = len(list(observer_nodes(program)))
        target = f"{PREFIX}.{count}"
        observer = OBSERVERS[spec.observer](spec, int(watched.shape[-1]))
        program.graph_module.add_submodule(target, observer)
        with program.graph.inserting_before(linear):
            node = program.graph.call_module(target, (source,))
        node.meta = {"val": watched}
        node.meta["nn_module_stack"] = dict(linear.meta.get("nn_module_stack") or {})
        annotate(node, modality=annotation(source).get("modality"), observer=spec.observer)
        return node


def sees(program: Program, activation: fx.Node, sample: Mapping[str, Tensor]) -> bool:
    """Whether a sample says something about an activation: a text alone nothing about pictures."""
    text_alone = sample.keys() < program.example_inputs.keys()
    return not (text_alone and annotation(activation).get("modality") == "vision")


@torch.no_grad()
def run_observers(
    program: Program, observers: Mapping[fx.Node, Any], samples: Sequence[Mapping[str, Tensor]]
) -> None:
    """Run a program on samples, each watched by the observers that it says something to.

    Args:
        observers: node -> module whose `watching` says whether it looks; none does afterwards,
            since what runs the program later shall not count.
    """
    for sample in samples:
        for node, observer in observers.items():
            observer.watching = sees(program, node, sample)
        program(**{**program.example_inputs, **sample})
    for observer in observers.values():
        observer.watching = False


def observer_nodes(program: Program) -> Iterator[fx.Node]:
    """The observers of activations of a program, in order."""
    nodes = program.graph.find_nodes(op="call_module")
    return (node for node in nodes if str(node.target).startswith(f"{PREFIX}."))


def _observer(program: Program, node: fx.Node) -> Observer:
    found = program.graph_module.get_submodule(str(node.target))
    assert isinstance(found, Observer)
    return found


def _observed_linears(program: Program) -> Iterator[fx.Node]:
    return (node for node in program.graph.nodes if {"act", "quant"} <= annotation(node).keys())
