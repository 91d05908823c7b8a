"""compile(): the whole pipeline on one page.

capture -> passes (analyse, plan, insert) -> freeze -> lower -> artifact
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gracec import gates
from gracec._version import __version__
from gracec.capture import capture, captured_equals_eager, family_of
from gracec.errors import GracecError
from gracec.models import check_finite, load_model, load_processor, model_without_weights
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import Freeze, FrozenWeight, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.lower_torchao import LowerTorchao, lowered_weights
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.passes.strip import Strip
from gracec.program import Program
from gracec.recipe import Recipe
from gracec.report import Report, weight_bytes
from gracec.report.report import plan_rows, sqnr_db
from gracec.store import Store, read_store, write_directory, write_store


def compile(
    model: PreTrainedModel | str | Path,
    recipe: str | Path | Recipe = "w4a16-ptq",
    *,
    processor: Any = None,
    output_dir: str | Path | None = None,
    strict: bool = False,
    inplace: bool = False,
) -> CompiledModel:
    """Compile a vision-language model to INT4 weights.

    Args:
        model: a Hugging Face model, or the directory of one.
        recipe: a built-in name, the path of a YAML file, or a `Recipe`.
        processor: saved with the result; loaded from the directory when `model` is one.
        output_dir: where to save the result; must not exist.
        strict: refuse what would otherwise be reported and left in the original precision.
        inplace: allow the caller's model to be changed; saves one copy of it.

    Raises:
        GracecError: if the model, the recipe or the output directory does not fit.
        GateError: if the result is not numerically what it should be.
    """
    recipe = Recipe.load(recipe)
    check_runnable(recipe)
    if output_dir is not None and Path(output_dir).exists():
        raise GracecError(
            "the output directory exists", where=str(output_dir), fix="choose another"
        )
    if isinstance(model, (str, Path)):
        family_of(model_without_weights(model))  # refused before gigabytes are read
        processor = processor or load_processor(model)
        model = load_model(model)
    else:
        check_finite(model)
        model = model if inplace else copy.deepcopy(model)
    model.eval()

    program = capture(model)
    figures: dict[str, Any] = {"captured_equals_eager": captured_equals_eager(program, model)}
    search = recipe.scale_search
    prepared = run_passes(
        program,
        [
            AnalyzeModality(),
            PlanQuantization(recipe=recipe, strict=strict),
            InsertFakeQuant(search.candidates, search.lowest, search.highest),
        ],
    )
    frozen = run_passes(prepared.program, [Freeze()])
    inputs = program.example_inputs
    reference = gates.frozen_equals_fake_quantized(prepared.program, frozen.program, inputs)
    figures["frozen_equals_fake_quantized"] = True

    weights = frozen_weights(frozen.program)
    rows = plan_rows(plan_of(prepared.program), sqnr_db(model, weights))
    notes = [*prepared.notes, *frozen.notes]
    sizes = weight_bytes(model, weights)
    del program, prepared, frozen
    lowered = _lower(model, weights, getattr(torch, recipe.deploy.dtype), strict)
    notes += lowered.notes
    figures |= _lowering_gates(model, lowered, weights, inputs, reference)
    report = Report(recipe.to_dict(), rows, notes, figures, sizes)
    compiled = CompiledModel(model, lowered, weights, report, processor)
    if output_dir is not None:
        compiled.save_pretrained(output_dir)
    return compiled


def check_runnable(recipe: Recipe) -> None:
    """Refuse a recipe that no backend can run, whatever the model.

    Raises:
        GracecError: with the reason.
    """
    if any(recipe.activations.values()):
        raise GracecError(
            "no backend runs quantized activations yet",
            where=f"recipe {recipe.name}",
            fix="use the passes (insert-observers, insert-fake-quant, freeze), or a w4a16 recipe",
        )


def load(directory: str | Path) -> CompiledModel:
    """Load what `CompiledModel.save_pretrained` wrote; the same codes, the same tokens.

    Raises:
        GracecError: if the directory is not a whole artifact.
    """
    directory = Path(directory)
    store = read_store(directory)
    report = Report(**store.manifest["report"])
    dtype = getattr(torch, report.recipe["deploy"]["dtype"])
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # buffers that are not saved are computed
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    tensors = dict(store.others)
    tensors |= {fqn: _stand_in(weight.codes.shape, dtype) for fqn, weight in store.weights.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise GracecError(f"{missing[0]} is missing", where=str(directory))
    model.requires_grad_(False)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    model.eval()
    lowered = _lower(model, store.weights, dtype, strict=False)
    return CompiledModel(model, lowered, store.weights, report, load_processor(directory))


class CompiledModel:
    """A compiled vision-language model.

    Calling it runs the lowered graph; `generate` runs the Hugging Face generation loop over modules
    that hold the very same packed tensors.

    Attributes:
        model: the Hugging Face model with packed INT4 weights in the place of the planned ones.
        program: the lowered graph.
        weights: FQN -> canonical codes and scales.
        report: what was done, with all figures.
        processor: of the original model, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        program: Program,
        weights: Mapping[str, FrozenWeight],
        report: Report,
        processor: Any = None,
    ) -> None:
        self.model, self.program, self.weights = model, program, weights
        self.report, self.processor = report, processor

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.program.dtype

    def __call__(self, **inputs: Tensor) -> CausalLMOutput:
        """Logits [B, T, V] of a batch from the processor, computed by the lowered graph."""
        prepared = family_of(self.model).prepare(self.model, inputs)
        with torch.no_grad():
            return CausalLMOutput(logits=self.program(**prepared)[0])

    def generate(self, **inputs: Any) -> Tensor:
        """Token ids [B, T + new]; takes what the model's own `generate` takes."""
        if inputs.get("pixel_values") is not None:
            inputs |= family_of(self.model).prepare(self.model, inputs)
        model: Any = self.model
        tokens: Tensor = model.generate(**inputs)
        return tokens

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the canonical artifact: codes, scales, configuration, processor and report.

        Raises:
            GracecError: if the directory exists.
        """
        others: dict[str, Tensor] = {
            name: tensor
            for name, tensor in self.model.named_parameters()
            if name not in self.weights
        }
        buffers = self.model.state_dict()
        others.update((n, b) for n, b in self.model.named_buffers() if n in buffers)
        manifest = {
            "gracec": __version__,
            "torch": torch.__version__,
            "family": self.program.family,
            "report": self.report.to_dict(),
        }

        def fill(target: Path) -> None:
            self.model.config.save_pretrained(target)
            self.model.generation_config.save_pretrained(target)
            if self.processor is not None:
                self.processor.save_pretrained(target)
            write_store(Store(self.weights, others, manifest), target)

        write_directory(Path(directory), fill)


def _lower(
    model: PreTrainedModel, weights: Mapping[str, FrozenWeight], dtype: torch.dtype, strict: bool
) -> Program:
    """Lower a model in place: its planned weights become packed tensors, shared with the graph.

    The graph is captured again, in the dtype that it runs in. The planned weights are stand-ins
    without memory meanwhile: a trace looks at shapes only.
    """
    for fqn, weight in weights.items():
        _set_parameter(model, fqn, _stand_in(weight.codes.shape, dtype))
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    result = run_passes(capture(model), [ApplyCodes(weights), LowerTorchao(strict), Strip()])
    for target, names in result.program.fqns.items():
        if names[0] in weights:
            _set_parameter(model, names[0], result.program.tensor(target))
    result.program.notes = result.notes
    return result.program


def _lowering_gates(
    model: PreTrainedModel,
    lowered: Program,
    weights: Mapping[str, FrozenWeight],
    inputs: Mapping[str, Tensor],
    reference: Tensor,
) -> dict[str, Any]:
    """Every gate on the lowered model; the figures go into the report."""
    inputs = family_of(model).prepare(model, inputs)
    packed = lowered_weights(lowered)
    figures: dict[str, Any] = {
        "matmul_error": gates.matmul_error(packed, weights),
        "int4_kernels": gates.int4_kernels_run(lowered, inputs),
        "lowered_equals_generating": captured_equals_eager(lowered, model),
    }
    mask = inputs["attention_mask"]
    with torch.no_grad():
        found = gates.logit_agreement(reference, lowered(**inputs)[0], mask)
        # The same values as dense weights in the same dtype, for comparison.
        for fqn in packed:
            _set_parameter(model, fqn, nn.Parameter(weights[fqn].dequantize(lowered.dtype)))
        logits = model(**inputs, use_cache=False).logits
        for fqn, tensor in packed.items():
            _set_parameter(model, fqn, tensor)
    dense = gates.logit_agreement(reference, logits, mask)
    gates.lowered_is_as_good_as_dense(found, dense, reference.dtype)
    return {**figures, "logits": asdict(found), "logits_dense": asdict(dense)}


def _stand_in(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this shape that occupies the memory of one number."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)


def _set_parameter(model: PreTrainedModel, fqn: str, tensor: Tensor) -> None:
    owner, _, name = fqn.rpartition(".")
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(owner), name, tensor)
