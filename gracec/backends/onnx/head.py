"""A head in codes of the format's own, where the model has it in float.

The head of a small model is a large part of what a token has to read. A recipe that quantizes it
gives it canonical codes like any weight. Here a head without codes gets some as it is written: they
are in the graphs alone, and `session.json` has their hash.

The head of 16 MiB and less stays as it is: it is not what a token waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx
from transformers import PreTrainedModel

from gracec.backends.onnx import gates
from gracec.backends.onnx.mode import Expected
from gracec.capture.serving import Serving
from gracec.capture.serving_graph import DECODER
from gracec.ir.program import Program
from gracec.ir.queries import weight_of
from gracec.kernels.onnxruntime import BLOCK_SIZES, FAITHFUL
from gracec.models.surgery import names_of_one
from gracec.passes import run_passes
from gracec.passes.apply_codes import APPLICABLE, ApplyCodes
from gracec.passes.freeze import frozen_weights
from gracec.passes.strip import drop_dead
from gracec.quant import QuantSpec, quantize
from gracec.quant.frozen import FrozenWeight, code_hash
from gracec.quant.observers import weight_scales
from gracec.recipe import OnnxDeploy

LARGE = 16 << 20
"""Bytes in float32 above which a head gets codes that nobody asked for."""
BITS = 8
GROUP = 128


class Head(NamedTuple):
    """What became of the head.

    Attributes:
        serving: the graphs, with its codes if it got some.
        figures: of `session.json`; empty where nothing was tried.
        notes: what a user should know.
    """

    serving: Serving
    figures: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def quantize_head(
    serving: Serving, model: PreTrainedModel, expected: Expected, options: OnnxDeploy
) -> Head:
    """Put the head on integer codes, as the options say.

    Args:
        serving: graphs with the codes of everything else.
        expected: what they compute; it knows of the head afterwards.

    Raises:
        GateError: if codes that were asked for by their bits are off by more than 8-bit
            activations may be.
    """
    asked = options.head in (4, 8)
    if options.head == "keep" or (options.head == "auto" and options.mode == FAITHFUL):
        return Head(serving, {})
    program = serving[DECODER].program
    linear = _head(program, model)
    if linear is None:
        return Head(serving, {}, ("the head keeps its precision: it is no linear layer",) * asked)
    target = str(linear.args[1].target)  # type: ignore[union-attr]
    weight = program.tensor(target)
    if not asked and weight.numel() * 4 < LARGE:
        return Head(serving, {})
    columns = weight.shape[1]
    group = _group(program, columns)
    if not group:
        reason = f"no block of {BLOCK_SIZES[-1]} or more divides its {columns} input features"
        return Head(serving, {}, (f"the head keeps its precision: {reason}",))
    bits = BITS if options.head == "auto" else int(options.head)
    spec = QuantSpec(bits, group)
    # At 8 bits the range alone is as good as a search, which takes a minute for a large one.
    scales = weight_scales(weight.float(), spec, "min_max" if bits == BITS else "mse")
    codes = quantize(weight.float(), scales, bits, group)
    head = FrozenWeight.from_codes(codes, scales, spec)
    del codes
    fqn = _name(program, target)
    tried = _with_head(serving, target, fqn, head)
    agreement, reason = expected.add_head(tried, model)
    figures = {"spec": str(spec), "sha256": code_hash(head), "kl": agreement.kl}
    if asked:
        gates.rounding_is_small(agreement, fix="use head: keep")
    elif reason:
        expected.without_head()
        kept = f"the head keeps its precision: in {spec} {reason}"
        return Head(serving, {"head": {**figures, "kept": reason}}, (kept,))
    return Head(
        tried,
        {"head": {**figures, "fqn": fqn}},
        (f"{fqn} in {spec}, codes of these graphs alone: KL {agreement.kl:.2g}",),
    )


def _head(program: Program, model: PreTrainedModel) -> fx.Node | None:
    """The linear of a decoder that makes logits with a float weight."""
    module: Any = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    parameters = dict(model.named_parameters())
    names = [
        name
        for first, all_names in names_of_one(model).items()
        if parameters[first] is weight
        for name in all_names
    ]
    for node in program.graph.nodes:
        if node.target not in APPLICABLE:
            continue
        operand = weight_of(node)
        if operand is None or node.args[1] is not operand:
            continue
        if set(program.fqns.get(str(operand.target), ())) & set(names):
            return node  # type: ignore[no-any-return]
    return None


def _name(program: Program, target: str) -> str:
    """Of a head that is the token embedding, the name that it has as a head."""
    return program.fqns[target][-1]


def _group(program: Program, columns: int) -> int:
    """The group that most weights of the decoder have, if it divides the head; 0 if none does."""
    specs = Counter(weight.spec for weight in frozen_weights(program).values())
    common = [spec.group_size for spec, _ in specs.most_common() if spec.granularity == "per_group"]
    fitting = [g for g in (*common, GROUP, *BLOCK_SIZES) if g >= BLOCK_SIZES[-1]]
    return next((group for group in fitting if columns % group == 0), 0)


def _with_head(serving: Serving, target: str, fqn: str, head: FrozenWeight) -> Serving:
    decoder = serving[DECODER]
    program = decoder.program.copy()
    program.fqns[target] = (fqn,)
    program = run_passes(program, [ApplyCodes({fqn: head})]).program.copy()
    drop_dead(program)
    return {**serving, DECODER: replace(decoder, program=program)}
