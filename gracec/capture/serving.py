"""Capture the graphs that a runtime runs, and prove that together they are the training graph.

The plan is made once, on the training graph. Its codes are applied here by the names of the
weights, and each weight has to be in exactly one graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from transformers import PreTrainedConfig, PreTrainedModel

from gracec.capture.capture import gate_batches, trace
from gracec.capture.families import Family, family_for, family_of
from gracec.capture.greedy import prompt_logits
from gracec.capture.serving_graph import (
    DECODER,
    EMBEDDING,
    VISION,
    ServingGraph,
    Shape,
    decoder_inputs,
    empty_cache,
)
from gracec.errors import GateError
from gracec.ir.program import Program
from gracec.ir.queries import weight_of
from gracec.passes import run_passes
from gracec.passes.apply_codes import APPLICABLE, ApplyCodes
from gracec.passes.freeze import QUANTIZE_DEQUANTIZE, frozen_weights
from gracec.passes.strip import drop_dead
from gracec.quant.frozen import FrozenWeight, code_hash

COMPOSED_BOUND = 1e-4
"""Thirty layers of real weights add up to 3e-5 by another order of summation alone."""


@dataclass(frozen=True)
class ServingProgram:
    """A captured graph and the shapes that its inputs and outputs have, by their outside names.

    The program's inputs are the same in the same order; `past_key_values.0.key` is
    `past_key_values_0` there, since a name of Python holds no dot.
    """

    program: Program
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, from inputs by name."""
        names = zip(self.program.example_inputs, self.inputs, strict=True)
        with torch.no_grad():
            found = self.program(**{own: inputs[name] for own, name in names})
        return dict(zip(self.outputs, found, strict=True))


Serving = Mapping[str, ServingProgram]
"""Name of a graph -> the graph."""


def capture_serving(model: PreTrainedModel) -> dict[str, ServingProgram]:
    """The graphs `vision_encoder`, `embed_tokens` and `decoder` of a model.

    They share their parameters with it. Batch, length, cache and number of images stay dynamic.

    Raises:
        GracecError: if the family has no serving graphs, or one cannot be traced.
        GateError: if a dimension that has to be dynamic came out fixed, or the reverse.
    """
    graphs = family_of(model).serving_graphs(model)
    return {name: _capture(model, name, graph) for name, graph in graphs.items()}


def _capture(model: PreTrainedModel, name: str, graph: ServingGraph) -> ServingProgram:
    sizes = (size for shape in graph.inputs.values() for size in shape if isinstance(size, str))
    # A sum cannot be told to torch.export, and a size that is there once need not be; it may be a
    # multiple of something.
    dims = {
        symbol: Dim(symbol) if count > 1 and " " not in symbol else Dim.DYNAMIC
        for symbol, count in Counter(sizes).items()
    }
    dynamic = {
        name: {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in graph.inputs.items()
    }
    traced = trace(
        model, graph.module, _nested(graph.example), _nested(dynamic), tuple(graph.outputs)
    )
    serving = ServingProgram(traced, graph.inputs, graph.outputs)
    _check_shapes(name, serving)
    return serving


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`name.0.key`, `name.0.value`, ... -> one list, `name`."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        name, dot, _ = path.partition(".")
        if dot:
            nested.setdefault(name, []).append(value)
        else:
            nested[name] = value
    return nested


def _check_shapes(graph: str, serving: ServingProgram) -> None:
    """Every dimension is what the graph says; a symbol stands for one size throughout."""
    program = serving.program
    nodes = [*program.graph.find_nodes(op="placeholder"), *program.outputs.values()]
    shapes = [*serving.inputs.items(), *serving.outputs.items()]
    known: dict[str, Any] = {}
    for node, (name, shape) in zip(nodes, shapes, strict=True):
        found = tuple(node.meta["val"].shape)
        if len(found) != len(shape):
            raise GateError(f"{name} has the shape {found}, not {shape}", where=graph)
        for axis, (size, expected) in enumerate(zip(found, shape, strict=True)):
            fixed = isinstance(size, int)
            if isinstance(expected, int):
                wrong = not fixed or size != expected
            elif fixed:
                wrong = True
            elif " + " in expected and node.op != "placeholder":
                wrong = size.node.expr != sum(known[part] for part in expected.split(" + "))
            else:
                wrong = known.setdefault(expected, size.node.expr) != size.node.expr
            if wrong:
                raise GateError(
                    f"dimension {axis} of {name} is {size} in the captured graph, not {expected}",
                    where=graph,
                )


def apply_codes(
    serving: Serving, weights: Mapping[str, FrozenWeight]
) -> tuple[dict[str, ServingProgram], int]:
    """Put the codes of the training graph into the serving graphs, and drop what they do not use.

    Returns:
        The graphs, and the number of weights whose codes and scales are found equal in them.

    Raises:
        GateError: if a weight is not in exactly one graph, or its codes are others there.
    """
    applied: dict[str, ServingProgram] = {}
    found: dict[str, str] = {}
    for name, graph in serving.items():
        own = {fqn: weights[fqn] for fqn in _linear_weights(graph.program) if fqn in weights}
        program = run_passes(graph.program, [ApplyCodes(own)] if own else []).program
        for fqn, weight in frozen_weights(program).items():
            if fqn in found:
                raise GateError("the weight is in two serving graphs", where=fqn)
            found[fqn] = code_hash(weight)
        program = program.copy()
        drop_dead(program)
        applied[name] = replace(graph, program=program)
    for fqn, weight in weights.items():
        if fqn not in found:
            raise GateError("the weight has codes but is in no serving graph", where=fqn)
        if found[fqn] != code_hash(weight):
            raise GateError("the codes are other than those of the training graph", where=fqn)
    return applied, len(found)


def _linear_weights(program: Program) -> set[str]:
    weights = (weight_of(node) for node in program.graph.nodes if node.target in APPLICABLE)
    return {program.fqn(str(weight.target)) for weight in weights if weight is not None}


def composed_equals_training(
    serving: Serving, training: Callable[..., Tensor], model: PreTrainedModel
) -> float:
    """Gate: vision, embedding and decoder together compute the logits that training computes.

    At each of the shapes that a capture is held to: the whole prompt at once, and its second half
    after a cache of the first one. Inputs of linears are left unrounded: a difference in the last
    bit of a sum, which graphs of other shapes may have, may move a code by one. That both round to
    the same grids is in `code_hash`.

    Args:
        training: prepared inputs -> logits [B, T, V], with inputs of linears unrounded; the module
            that the training graph is traced from will do, since they are equal bit for bit.
        model: gives example inputs; its weights are not used.

    Returns:
        The largest difference of a logit, relative to the largest logit.
    """
    worst = 0.0
    serving = {
        name: replace(graph, program=_unrounded(graph.program)) for name, graph in serving.items()
    }
    runtime = ServingRuntime(serving, model.config)
    for batch in gate_batches(family_of(model), model):
        inputs = family_of(model).prepare(model, batch)
        with torch.no_grad():
            expected = training(**inputs).double()
        positions = inputs.get("position_ids")
        if positions is None:  # they count padding, as in the training graph
            positions = runtime.family.positions(torch.ones_like(inputs["attention_mask"]))
        length = expected.shape[1]
        halves = slice(0, length // 2), slice(length // 2, length)
        for parts in ((slice(0, length),), halves):
            found = prompt_logits(runtime, inputs, parts, positions).double()
            difference = (expected - found).abs().max() / expected.abs().max()
            worst = max(worst, difference.item())
    if not worst <= COMPOSED_BOUND:
        raise GateError(
            f"the serving graphs are off by {worst:.3g} from what training computes, "
            f"the bound is {COMPOSED_BOUND:.0e}"
        )
    return worst


def _unrounded(program: Program) -> Program:
    """The program with floating-point inputs of its linears."""
    program = program.copy()
    for node in list(program.nodes(QUANTIZE_DEQUANTIZE)):
        x = node.args[0]
        assert isinstance(x, fx.Node)
        node.replace_all_uses_with(x)
        program.graph.erase_node(node)
    program.recompile()
    return program


class ServingRuntime:
    """Serving graphs run by torch; a cache is a dictionary of tensors."""

    def __init__(self, serving: Serving, config: PreTrainedConfig) -> None:
        self.serving, self.config = serving, config

    @property
    def family(self) -> Family:
        return family_for(self.config)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        (features,) = self.serving[VISION].run(inputs).values()
        return features

    def embed(self, input_ids: Tensor) -> Tensor:
        (embeds,) = self.serving[EMBEDDING].run({"input_ids": input_ids}).values()
        return embeds

    def decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        keep: int,
        past: Any = None,
    ) -> tuple[Tensor, Any]:
        decoder = self.serving[DECODER]
        if past is None:
            past = empty_cache(decoder.inputs, len(embeds), embeds.dtype, embeds.device)
        given = decoder_inputs(embeds, attention_mask, position_ids, keep)
        outputs = decoder.run({**given, **past})
        logits = outputs.pop("logits")
        return logits, dict(zip(past, outputs.values(), strict=True))
