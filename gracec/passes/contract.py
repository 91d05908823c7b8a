"""What every pass promises, as a check that a test calls:

    check_contract(ProtectFragile(floor=18), program)

A pass leaves its input as it is; run again it changes nothing; it says that it modified something
only if it did; and it keeps the outputs bit for bit if it says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gracec.errors import PassError
from gracec.ir.program import Program, annotation
from gracec.ir.text import format
from gracec.passes.base import Pass, PassResult
from gracec.quant.second_moments import SecondMoments


def check_contract(
    item: Pass, program: Program, inputs: Mapping[str, Tensor] | None = None
) -> PassResult:
    """Run a pass on a program, and once more on the result.

    Args:
        program: one that the pass can run on, best one that it changes.
        inputs: for the outputs to be compared on; without them, the example inputs.

    Returns:
        The result of the first run.

    Raises:
        PassError: if the pass breaks a promise, or refuses the program or its own result.
    """
    before = _State.of(program)
    result = item.run(program)
    _require_unchanged_input(item, before, program)
    after = _State.of(result.program)
    _require_honesty(item, result, before.difference(after))
    if item.keeps_numerics:
        _require_equal_outputs(item, program, result.program, inputs)
    try:
        again = item.run(result.program)
    except PassError as error:
        raise item.refuse(f"does not run on its own result ({error})") from error
    _require_unchanged_input(item, after, result.program)
    difference = after.difference(_State.of(again.program))
    if again.modified or difference:
        found = difference or "it says that it modified something"
        raise item.refuse(f"a second run is not without effect: {found}")
    return result


def _require_unchanged_input(item: Pass, before: _State, program: Program) -> None:
    if difference := before.difference(_State.of(program)):
        raise item.refuse(
            f"changes its input: {difference}",
            fix="tensors, example inputs and annotations are shared: replace, never write into",
        )


def _require_honesty(item: Pass, result: PassResult, difference: str) -> None:
    if difference and not result.modified:
        raise item.refuse(f"says that nothing is modified: {difference}")
    if result.modified and not difference:
        raise item.refuse("says that something is modified, and nothing is")


def _require_equal_outputs(
    item: Pass, before: Program, after: Program, inputs: Mapping[str, Tensor] | None
) -> None:
    given = dict(inputs or {})
    found = []
    for program in (before, after):
        with torch.no_grad():
            outputs = program(**{**program.example_inputs, **given})
        named = zip(program.output_names, outputs, strict=True)
        found.append({name: digest(tensor) for name, tensor in named})
    shared = [name for name in found[0] if name in found[1]]
    if not shared:
        raise item.refuse("keeps no output, so it cannot keep the numerics")
    for name in shared:
        if found[0][name] != found[1][name]:
            raise item.refuse("says that it keeps the numerics: other bits", where=f"output {name}")


@dataclass(frozen=True)
class _State:
    """All of a program that a pass could change.

    Attributes:
        tensors: parameters, buffers and what observers have kept; name -> digest.
        inputs: example inputs; name -> digest.
        names: the rest: what tensors are called, annotations that the text leaves out, dynamic
            shapes, dtype, device.
    """

    text: str
    tensors: Mapping[str, str]
    inputs: Mapping[str, str]
    names: Mapping[str, Any]

    @classmethod
    def of(cls, program: Program) -> _State:
        graph = program.graph
        targets = {str(node.target) for node in graph.find_nodes(op="get_attr")} | {*program.fqns}
        tensors = {target: digest(program.tensor(target)) for target in sorted(targets)}
        for node in graph.find_nodes(op="call_module"):
            observer = program.graph_module.get_submodule(str(node.target))
            public = {k: v for k, v in vars(observer).items() if not k.startswith("_")}
            tensors |= {f"{node.target}.{k}": _seen(v) for k, v in public.items()}
        return cls(
            format(program),
            tensors,
            {name: digest(tensor) for name, tensor in program.example_inputs.items()},
            {
                **{f"the name of {target}": names for target, names in program.fqns.items()},
                **{f"the shape of {k}": str(v) for k, v in program.dynamic_shapes.items()},
                **{f"what is known of {k}": v for k, v in _annotations(program).items()},
                "the order of the inputs": tuple(program.example_inputs),
                "the dtype": program.dtype,
                "the device": program.device,
                "the family": program.family,
                "the number of layers": program.decoder_layers,
            },
        )

    def difference(self, other: _State) -> str:
        """What is different first; empty if nothing is."""
        lines = self.text.splitlines(), other.text.splitlines()
        for first, second in zip(*lines, strict=False):
            if first != second:
                return f"{first!r} became {second!r}"
        if len(lines[0]) != len(lines[1]):
            return f"{len(lines[0])} lines of text became {len(lines[1])}"
        for kind, mine, others in (
            ("tensor ", self.tensors, other.tensors),
            ("example input ", self.inputs, other.inputs),
            ("", self.names, other.names),
        ):
            for name in [*mine, *others]:
                if mine.get(name) != others.get(name):
                    return f"{kind}{name} is another"
        return ""


def digest(tensor: Tensor) -> str:
    """A hash of the dtype, the shape and the bits of a tensor, packed ones included."""
    found = hashlib.sha256(f"{type(tensor).__name__} {tensor.dtype} {tensor.shape}".encode())
    if hasattr(tensor, "__tensor_flatten__"):
        names, rest = tensor.__tensor_flatten__()
        found.update(repr(rest).encode())
        for name in names:
            found.update(digest(getattr(tensor, name)).encode())
    elif not tensor.is_meta:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _annotations(program: Program) -> dict[str, dict[str, Any]]:
    """Those of parameters and buffers; those of values are in the text."""
    nodes = program.graph.find_nodes(op="get_attr")
    return {program.fqn(str(node.target)): dict(annotation(node)) for node in nodes}


def _seen(value: Any) -> str:
    """What an observer has kept: a tensor, several of them, second moments, or a plain value."""
    if isinstance(value, SecondMoments):
        return _seen([value.sums, value.counts])
    if isinstance(value, (list, tuple)):
        return " ".join(map(_seen, value))
    return digest(value) if isinstance(value, Tensor) else str(value)
