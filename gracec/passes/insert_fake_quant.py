"""insert-fake-quant: simulate the planned quantization inside the graph.

    linear(x, w) -> linear(x, fake_quantize(w, w_scale))

The scale parameter belongs to the module that owns the weight (`...q_proj.weight_scale`) and starts
at the scale of least squared error. The node stands right before its linear, because nodes of one
module must stay contiguous for `torch.export.unflatten`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from gracec import quant
from gracec.errors import GracecError
from gracec.ops import dtype_name
from gracec.passes.analyze_modality import value
from gracec.passes.base import Pass, PassResult
from gracec.program import Program, annotation

FAKE_QUANTIZE = torch.ops.gracec.fake_quantize.default


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Options: the grid of the scale search, in multiples of max|w| / q_max."""

    candidates: int = 64
    lowest: float = 0.3
    highest: float = 1.2
    name: ClassVar[str] = "insert-fake-quant"
    keeps_numerics: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        decided = {"quant", "kept"}
        if not any(decided & annotation(node).keys() for node in program.graph.nodes):
            raise self.refuse("no weight has a plan", fix="run plan-quantization first")

    def apply(self, program: Program) -> PassResult:
        inserted = 0
        for node in list(_planned(program)):
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if weight.target == FAKE_QUANTIZE:
                continue
            self._insert(program, node, weight)
            inserted += 1
        return PassResult(program, inserted > 0, (f"{inserted} weights fake-quantized",))

    def ensures(self, before: Program, after: Program) -> None:
        for node in _planned(after):
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or weight.target != FAKE_QUANTIZE:
                raise self.refuse(f"{node.name} is planned but not fake-quantized")

    def _insert(self, program: Program, linear: fx.Node, weight: fx.Node) -> None:
        spec = quant.QuantSpec(**annotation(linear)["quant"])
        target = str(weight.target)
        fqn = program.fqn(target)
        scale_target = f"{target}_scale"
        if scale_target not in program.fqns:  # a module that is called twice has one scale
            try:
                scales = quant.search_scales(
                    program.tensor(target),
                    spec.bits,
                    spec.group_size,
                    scale_grid=spec.scale_grid,
                    candidates=self.candidates,
                    lowest=self.lowest,
                    highest=self.highest,
                )
            except GracecError as error:
                raise self.refuse(error.what, where=fqn, fix=error.fix) from error
            param = nn.Parameter(quant.scale_to_param(scales, spec.parametrization))
            program.set_tensor(scale_target, param)
            program.fqns[scale_target] = (f"{fqn}_scale",)
        with program.graph.inserting_before(linear):
            scale = program.graph.get_attr(scale_target)
            fake = program.graph.call_function(
                FAKE_QUANTIZE,
                (
                    weight,
                    scale,
                    spec.bits,
                    spec.group_size,
                    spec.parametrization,
                    spec.scale_grid,
                    dtype_name(program.dtype),
                ),
            )
        weight_value = value(weight)
        assert weight_value is not None
        groups = weight_value.shape[1] // spec.group_size
        scale_shape = (weight_value.shape[0], groups)
        scale.meta = {"val": weight_value.new_empty(scale_shape, dtype=torch.float32)}
        fake.meta = {"val": torch.empty_like(weight_value)}
        for node in (scale, fake):
            node.meta["nn_module_stack"] = dict(linear.meta.get("nn_module_stack") or {})
        linear.update_arg(1, fake)


def _planned(program: Program) -> Iterator[fx.Node]:
    return (node for node in program.graph.nodes if "quant" in annotation(node))
