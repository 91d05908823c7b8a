"""torchao: INT4 kernels of PyTorch, on processors and on CUDA.

The lowered graph and the modules behind `generate` hold the very same packed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gracec import gates
from gracec.capture import capture, captured_equals_eager, family_of
from gracec.frozen import Frozen, build
from gracec.ir.program import Program
from gracec.journal import Equal, Error, Figure, Kernels, Note
from gracec.kernels import torchao
from gracec.models.experts import pack_experts
from gracec.models.surgery import quantize_inputs, set_tensor
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.base import run_passes
from gracec.passes.lower_torchao import LowerTorchao, lowered_weights
from gracec.passes.pipeline import Pipeline, parse_placed
from gracec.passes.strip import Strip
from gracec.quant.frozen import by_matrix
from gracec.targets.base import Runtime, Target


@dataclass(frozen=True)
class TorchaoModel:
    """A lowered graph, and a Hugging Face model that holds the same tensors.

    Attributes:
        model: with packed INT4 weights in the place of the planned ones.
        program: the lowered graph.
    """

    model: PreTrainedModel
    program: Program

    @property
    def config(self) -> PreTrainedConfig:
        found: PreTrainedConfig = self.model.config
        return found

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.program.dtype

    def __call__(self, **inputs: Tensor) -> CausalLMOutput:
        """Logits [B, T, V], computed by the lowered graph."""
        prepared = family_of(self.model).prepare(self.model, inputs)
        with torch.no_grad():
            return CausalLMOutput(logits=self.program(**prepared)[0])

    def generate(self, **inputs: Any) -> Tensor:
        """Takes what the model's own `generate` takes."""
        model: Any = self.model
        if inputs.get("pixel_values") is not None:
            family_of(model).prepare(model, inputs)  # checks
            inputs |= family_of(model).model_inputs(model, inputs)
        tokens: Tensor = model.generate(**inputs)
        return tokens


class Torchao(Target):
    name: ClassVar[str] = "torchao"
    passes: ClassVar[tuple[str, ...]] = (ApplyCodes.name, LowerTorchao.name, Strip.name)

    def dense(self, frozen: Frozen) -> dict[str, str]:
        device = frozen.skeleton.device
        reasons = {
            fqn: torchao.refusal(weight.matrix_shape, weight.spec, frozen.dtype, device)
            for fqn, weight in frozen.weights.items()
        }
        return {fqn: reason for fqn, reason in reasons.items() if reason}

    def lower(self, frozen: Frozen, *, strict: bool = False) -> tuple[TorchaoModel, Sequence[Note]]:
        """The graph is captured again, in the dtype that it runs in; the planned weights are
        stand-ins meanwhile, since a trace looks at shapes only."""
        model = build(frozen)
        codes = [ApplyCodes(frozen.weights), LowerTorchao(strict)] if frozen.weights else []
        further = [parse_placed(text) for text in frozen.passes]
        pipeline, _ = Pipeline((*codes, Strip())).placed(further)
        result = run_passes(capture(model), pipeline)
        lowered = {names[0]: result.program.tensor(t) for t, names in result.program.fqns.items()}
        for fqn, weight in frozen.weights.items():
            if fqn in lowered:
                whole = lowered[fqn]
                set_tensor(model, fqn, weight.experts.held(whole) if weight.experts else whole)
            elif f"{fqn}.0" in lowered:
                pack_experts(model, fqn, [lowered[name] for name in by_matrix(fqn, weight)])
        grids = {fqn: weight.activation for fqn, weight in frozen.weights.items()}
        quantize_inputs(model, {fqn: grid for fqn, grid in grids.items() if grid is not None})
        return TorchaoModel(model, result.program), result.notes

    def gates(self, runtime: Runtime, frozen: Frozen) -> Mapping[str, Figure]:
        assert isinstance(runtime, TorchaoModel)
        model, program = runtime.model, runtime.program
        family = family_of(model)
        batch = family.example_batch(model)
        inputs, own_inputs = family.prepare(model, batch), family.model_inputs(model, batch)
        packed = lowered_weights(program)
        error = gates.matmul_error(packed, frozen.weights)
        kernels = gates.int4_kernels_run(program, inputs, model, own_inputs)
        return {
            "matmul_error": Error(
                error, gates.MATMUL_BOUND[frozen.dtype], "of the largest output, against float64"
            ),
            "int4_kernels": Kernels(kernels, len(packed)),
            "lowered_equals_generating": Equal(captured_equals_eager(program, model), "batches"),
        }
