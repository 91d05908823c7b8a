"""compile(): the whole pipeline on one page.

capture -> passes (analyse, plan, insert) -> freeze -> lower -> artifact
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gracec import gates
from gracec._memory import trim
from gracec._version import __version__
from gracec.adapters import attach_adapters, has_adapters, keep_adapters, merge_adapters
from gracec.backends.base import MERGE_INSTEAD, NO_ADAPTERS, Artifact, Format, parse_formats
from gracec.backends.onnx_hf import Onnx
from gracec.backends.torchao import CountInt4Kernels
from gracec.capture import capture, captured_equals_eager, family_of
from gracec.errors import GateError, GracecError
from gracec.evaluate import VqaSample, accuracy_rows, evaluate_vqa, load_image, load_samples
from gracec.evaluate.data import SAMPLES_FILE
from gracec.models import (
    check_finite,
    fill_while_running,
    load_model,
    load_processor,
    model_without_weights,
    quantize_inputs,
    set_tensor,
    stand_in,
    untie_head,
)
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import Freeze, FrozenWeight, frozen_activations, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.insert_observers import InsertObservers
from gracec.passes.lower_torchao import LowerTorchao, lowered_weights
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.passes.strip import Strip
from gracec.program import Program
from gracec.recipe import Recipe, nearest
from gracec.report import Report, weight_bytes
from gracec.report.report import plan_rows, sqnr_db
from gracec.store import Store, check_target, read_store, write_directory, write_store
from gracec.training.run import calibration_samples, check_tokenizers, rank, train_student

if TYPE_CHECKING:
    from gracec.backends.onnx.runner import OnnxModel


def compile(
    model: PreTrainedModel | str | Path,
    recipe: str | Path | Recipe = "w4a16",
    *,
    teacher: PreTrainedModel | str | Path | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    processor: Any = None,
    output_dir: str | Path | None = None,
    formats: str | Sequence[str] = ("hf",),
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    inplace: bool = False,
    adapters: Literal["merge", "float"] = "merge",
    progress: bool = True,
) -> CompiledModel:
    """Compile a vision-language model to INT4 weights.

    Args:
        model: a Hugging Face model, or the directory of one; or a `PeftModel`, with LoRA adapters.
        recipe: a built-in name, the path of a YAML file, or a `Recipe`.
        teacher: what a training recipe distils from: a model of the same family and tokenizer, of
            any width. Without one, a frozen copy of the original teaches.
        train_data: LLaVA conversations, a `datasets` folder or a folder of questions; see
            `gracec.training.data`. Without it a training recipe falls back to post-training
            quantization and says so; in strict mode that is an error. A recipe that quantizes
            activations calibrates on it, whether it trains or not, and needs it.
        eval_data: chooses the best state of a training, instead of a part of `train_data`. A folder
            of questions is also answered before and after, and the accuracies go into the report.
        processor: saved with the result; loaded from the directory when `model` is one.
        output_dir: where to save the result. A training keeps its checkpoints beside it, in
            `<output_dir>.training`, until it is done.
        formats: what to save for other libraries, beside the canonical codes; () for none.
        resume: go on with a training that was interrupted.
        overwrite: let `output_dir` be an artifact already, which is replaced when all is done.
        strict: refuse what would otherwise be reported and left in the original precision.
        inplace: take the caller's model apart, so that its float weights give their memory back.
        adapters: of a `PeftModel`: "merge" makes them part of the weights before anything else;
            "float" quantizes the weights without them and keeps them beside, in the dtype of the
            recipe. They train with the part that they are in.
        progress: show a training on standard error.

    Raises:
        GracecError: if the model, the recipe, the data or the output directory does not fit.
        GateError: if the result is not numerically what it should be, or not as accurate as the
            recipe expects; then it is kept as `<output_dir>.failed`.
    """
    recipe = Recipe.load(recipe)
    wanted = parse_formats(formats)
    if output_dir is not None:
        check_target(Path(output_dir), overwrite)
        plain = [form.name for form in wanted if not form.holds_activations]
        if recipe.quantizes_activations and plain:
            raise GracecError(
                "the recipe quantizes activations, which the format cannot say",
                where=f"format {plain[0]}",
                fix="use --format onnx, or formats=() for the gracec artifact alone",
            )
    peft = not isinstance(model, (str, Path)) and has_adapters(model)
    _check_adapters(adapters, recipe, wanted if output_dir is not None else [], peft)
    notes = _check_training(recipe, train_data, teacher, resume, output_dir, strict)
    training = recipe.training if train_data is not None else None
    if isinstance(model, (str, Path)):
        source = Path(model).resolve().name
        shell = model_without_weights(model)
        family_of(shell).example_batch(shell)  # refused before gigabytes are read
        processor = processor or load_processor(model)
        model = load_model(model)
    else:
        if peft:
            if adapters == "merge":
                model, note = merge_adapters(model, inplace=inplace)
            else:
                model = model if inplace else share_weights(model)
                model, note = keep_adapters(model.eval())
            notes.append(note)
        source = str(getattr(model.config, "_name_or_path", ""))
        source = Path(source).name if Path(source).exists() else source
        check_finite(model)
        model = model if inplace else share_weights(model)
    model.eval()
    samples, data_name = _questions(eval_data)
    if eval_data is not None and training is None and not samples:
        raise GracecError(
            "eval_data holds no questions, and nothing is trained, so it would be ignored",
            where=str(eval_data) if isinstance(eval_data, (str, Path)) else "eval_data",
            fix=f"give a folder with {SAMPLES_FILE}",
        )
    _check_expectation(recipe, samples)
    if samples and processor is None:
        raise GracecError("questions need the model's processor", fix="pass processor=")
    subject: Any = model
    original = evaluate_vqa(subject, processor, samples) if samples else None
    if training is not None:
        distils = training.distillation.needs_teacher
        teacher = _teacher(teacher, model, processor) if distils else None
        model = own_weights(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recipe.quantizes("head") and untie_head(model):
        notes.append("the head was tied to the token embedding, which keeps its precision")

    program = capture(model)
    figures: dict[str, Any] = {"captured_equals_eager": captured_equals_eager(program, model)}
    search = recipe.scale_search
    held_out = _as_records(eval_data) if training is not None else None
    observers = []
    if recipe.quantizes_activations:
        watched, problems = calibration_samples(
            model, recipe, processor, train_data, held_out, strict
        )
        observers = [InsertObservers(watched)]
        notes += [f"calibration: {problem}" for problem in problems]
    prepared = run_passes(
        program,
        [
            AnalyzeModality(),
            PlanQuantization(recipe=recipe, strict=strict),
            *observers,
            InsertFakeQuant(search.candidates, search.lowest, search.highest),
        ],
    )
    notes += prepared.notes
    curve: dict[str, Any] = {}
    untrained: dict[str, float | None] = {}
    if training is not None:
        untrained = sqnr_db(prepared.program)
        trained = train_student(
            prepared.program,
            model,
            teacher if isinstance(teacher, PreTrainedModel) else None,
            recipe,
            processor,
            train_data,
            held_out,
            directory=None if output_dir is None else Path(f"{output_dir}.training"),
            resume=resume,
            strict=strict,
            progress=progress,
        )
        curve = trained.to_dict()
        notes += [f"training: {note}" for note in trained.notes]
        teacher = None
    batch = family_of(model).example_batch(model)
    inputs = family_of(model).prepare(model, batch)
    rows = plan_rows(plan_of(prepared.program), sqnr_db(prepared.program), untrained)
    with torch.no_grad():
        fake_quantized = prepared.program(**inputs)
    weights: dict[str, FrozenWeight] = {}
    if plan_of(prepared.program).quantized:
        frozen = run_passes(prepared.program, [Freeze(release=True)])
        gates.frozen_equals_fake_quantized(fake_quantized, frozen.program, inputs)
        figures["frozen_equals_fake_quantized"] = True
        weights = frozen_weights(frozen.program)
        notes += frozen.notes
        del frozen
    sizes = weight_bytes(model, weights, parameters)
    del program, prepared
    dtype: torch.dtype = getattr(torch, recipe.deploy.dtype)
    report = Report(recipe.to_dict(), rows, notes, figures, sizes, training=curve)
    if output_dir is not None:  # refused before the rest of the work
        check_formats(wanted, Artifact.of(model, weights, report, dtype=dtype))
    lowered = _lower(model, weights, dtype, strict)
    notes += lowered.notes
    figures |= _lowering_gates(model, lowered, weights, batch, fake_quantized[0])
    compiled = CompiledModel(model, lowered, weights, report, processor, source)
    trim()
    if samples and original:
        found = evaluate_vqa(compiled, processor, samples)
        report.accuracy.update(accuracy_rows(original, found, data_name))
    failure = None
    if recipe.expect is not None:
        try:
            gates.accuracy_is_as_expected(report.accuracy, recipe.expect)
        except GateError as error:
            failure = error
    if output_dir is not None and rank() == 0:
        target = f"{output_dir}.failed" if failure else output_dir
        notes += compiled.save_pretrained(target, formats, overwrite=overwrite or bool(failure))
        if curve:
            shutil.rmtree(f"{output_dir}.training")
    if failure is not None:
        kept = "" if output_dir is None else f"; kept as {output_dir}.failed"
        raise GateError(f"{failure}{kept}") from failure
    return compiled


def _check_adapters(adapters: str, recipe: Recipe, formats: Sequence[Format], given: bool) -> None:
    """Refuse a choice that cannot be kept, before anything is done."""
    if adapters not in ("merge", "float"):
        raise GracecError(f"unknown adapters {adapters!r}", fix="use merge or float")
    if adapters == "merge":
        return
    where, plain = 'adapters="float"', [form.name for form in formats if not form.holds_adapters]
    if not given:
        raise GracecError(
            "the model has no LoRA adapters, so it would be ignored",
            where=where,
            fix="give a PeftModel, or leave it out",
        )
    if recipe.quantizes_activations:
        raise GracecError(
            "the recipe quantizes activations, and an adapter takes them in float",
            where=where,
            fix=MERGE_INSTEAD,
        )
    if not any(recipe.weights.values()):
        raise GracecError(
            "the recipe quantizes no weight that an adapter could be beside",
            where=where,
            fix=MERGE_INSTEAD,
        )
    if plain:
        raise GracecError(NO_ADAPTERS, where=f"format {plain[0]}", fix=MERGE_INSTEAD)


def _check_training(
    recipe: Recipe,
    train_data: Any,
    teacher: Any,
    resume: bool,
    output_dir: str | Path | None,
    strict: bool,
) -> list[str]:
    """Notes on what a recipe cannot do with what is given.

    Raises:
        GracecError: if something was given that would be ignored.
    """
    where = f"recipe {recipe.name}"
    if recipe.quantizes_activations and train_data is None:
        raise GracecError(
            "activations need samples to calibrate on, and there is no train_data",
            where=where,
            fix="give train_data (--data): questions or conversations as the model will see",
        )
    if recipe.training is None:
        if recipe.quantizes_activations:
            train_data = None  # it calibrates
        ignored = {"train_data": train_data, "teacher": teacher, "resume": resume or None}
        given = [name for name, value in ignored.items() if value is not None]
        if given:
            raise GracecError(
                f"the recipe does not train, so {given[0]} would be ignored",
                where=where,
                fix="use a training recipe: w4a16",
            )
        return []
    if resume and output_dir is None:
        raise GracecError("there is nothing to resume without output_dir")
    if train_data is not None:
        if teacher is None and recipe.training.distillation.needs_teacher:
            return ["no teacher was given: a frozen copy of the original teaches"]
        return []
    if not any(recipe.weights.values()):
        raise GracecError("the recipe only trains, and there is no train_data", where=recipe.name)
    note = "no training data: post-training quantization instead"
    if strict or teacher is not None or resume:
        raise GracecError(note, where=where, fix="give train_data, or w4a16-ptq")
    return [note]


def _teacher(
    teacher: PreTrainedModel | str | Path | None, model: PreTrainedModel, processor: Any
) -> PreTrainedModel:
    """The teacher, loaded; by default the original itself, which training does not touch."""
    if isinstance(teacher, (str, Path)):
        check_tokenizers(processor, load_processor(teacher))
        teacher = load_model(teacher)
    found = model if teacher is None else teacher
    found.eval()
    return found


def _questions(eval_data: Any) -> tuple[list[VqaSample], str]:
    """Questions that can be answered before and after, and the name of the data."""
    if isinstance(eval_data, (str, Path)) and (Path(eval_data) / SAMPLES_FILE).is_file():
        return load_samples(Path(eval_data)), Path(eval_data).name
    if isinstance(eval_data, Sequence) and not isinstance(eval_data, str):
        return [s for s in eval_data if isinstance(s, VqaSample)], "the given questions"
    return [], ""


def _check_expectation(recipe: Recipe, samples: Sequence[VqaSample]) -> None:
    """Refuse an accuracy gate that has nothing to measure, before anything is trained."""
    if recipe.expect is None:
        return
    where = f"recipe {recipe.name}"
    if not samples:
        raise GracecError(
            "expect: there are no questions to measure an accuracy on",
            where=where,
            fix=f"give eval_data (--eval-data), a folder with {SAMPLES_FILE}",
        )
    types = list(dict.fromkeys(sample.type for sample in samples))
    if recipe.expect.type not in (None, *types):
        raise GracecError(
            f"expect.type: no question is of type {recipe.expect.type!r}",
            where=where,
            fix=nearest(str(recipe.expect.type), types),
        )


def _as_records(eval_data: Any) -> Any:
    """Questions as conversations, anything else as it is."""
    if isinstance(eval_data, (str, Path)) or not eval_data:
        return eval_data
    return [
        {
            "image": load_image(sample.image),
            "question": sample.question,
            "answer": sample.answer,
        }
        if isinstance(sample, VqaSample)
        else sample
        for sample in eval_data
    ]


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own that reads the very same memory; what is replaced in it, stays in it."""
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    buffers = {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, {**parameters, **buffers})


def own_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to be trained: weights of its own, in float32."""
    owned = share_weights(model)
    for parameter in owned.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return owned


@overload
def load(directory: str | Path, backend: Literal["torchao"] = "torchao") -> CompiledModel: ...
@overload
def load(directory: str | Path, backend: Literal["onnx"]) -> OnnxModel: ...
def load(directory: str | Path, backend: str = "torchao") -> CompiledModel | OnnxModel:
    """Load what `CompiledModel.save_pretrained` wrote; the same codes, the same tokens.

    Args:
        backend: what runs it: "torchao", or "onnx" for ONNX Runtime, which also runs what
            `export_onnx` wrote.

    Raises:
        GracecError: if the directory is not a whole artifact.
    """
    directory = Path(directory)
    if backend == "onnx":
        from gracec.backends.onnx.runner import OnnxModel  # takes a second to import

        return OnnxModel.load(directory)
    if backend != "torchao":
        raise GracecError(f"unknown backend {backend!r}", fix="use torchao or onnx")
    store = read_store(directory)
    report = Report(**store.manifest["report"])
    dtype = getattr(torch, report.recipe["deploy"]["dtype"])
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if hasattr(config, "quantization_config"):  # for other libraries, which do the same from it
        del config.quantization_config
    with init_empty_weights(include_buffers=False):  # buffers that are not saved are computed
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    attach_adapters(model, store.adapters, store.others)
    tensors = dict(store.others)
    tensors |= {fqn: stand_in(weight.shape, dtype) for fqn, weight in store.weights.items()}
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
    source = store.manifest["source"]
    return CompiledModel(model, lowered, store.weights, report, load_processor(directory), source)


class CompiledModel:
    """A compiled vision-language model.

    Calling it runs the lowered graph; `generate` runs the Hugging Face generation loop over modules
    that hold the very same packed tensors.

    Attributes:
        model: the Hugging Face model with packed INT4 weights in the place of the planned ones.
        program: the lowered graph.
        weights: FQN -> canonical codes and scales; read from the artifact when it was loaded.
        report: what was done, with all figures.
        processor: of the original model, or None.
        source: name of the original model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        program: Program,
        weights: Mapping[str, FrozenWeight],
        report: Report,
        processor: Any = None,
        source: str = "",
    ) -> None:
        self.model, self.program, self.weights = model, program, weights
        self.report, self.processor, self.source = report, processor, source

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
        model: Any = self.model
        if inputs.get("pixel_values") is not None:
            family_of(model).prepare(model, inputs)  # checks
            inputs |= family_of(model).model_inputs(model, inputs)
        tokens: Tensor = model.generate(**inputs)
        return tokens

    def save_pretrained(
        self,
        directory: str | Path,
        formats: str | Sequence[str] = ("hf",),
        *,
        overwrite: bool = False,
    ) -> tuple[str, ...]:
        """Write the canonical artifact, which `gracec.load` reads, and formats for other libraries.

        Args:
            formats: names of formats: "hf" (compressed-tensors, for plain transformers), "torchao",
                "awq", "onnx", a text "hf,awq", or "all"; () for none.
            overwrite: replace an artifact that is there, in a single step.

        Returns:
            What a user should know about the formats.

        Raises:
            GracecError: if the directory exists, a format cannot hold the weights, or the disk does
                not take it. Nothing half-written is left.
        """
        wanted = parse_formats(formats)
        artifact = self._artifact()
        check_formats(wanted, artifact)
        manifest = {
            "gracec": __version__,
            "torch": torch.__version__,
            "family": self.program.family,
            "source": self.source,
            "report": self.report.to_dict(),
            "formats": {form.name: form.folder for form in wanted},
        }
        notes: list[str] = []

        def fill(target: Path) -> None:
            plain = not self.weights and any(not form.folder for form in wanted)
            for form in [] if plain else wanted:
                notes.extend(form.write(artifact, target / form.folder))
            if plain or all(form.folder for form in wanted):  # else the top level is written
                if plain:  # nothing is quantized: an ordinary model, which everything loads
                    self.model.save_pretrained(target)
                    notes.append("nothing is quantized: an ordinary Hugging Face model")
                else:
                    self.model.config.save_pretrained(target)
                self.model.generation_config.save_pretrained(target)
                if self.processor is not None:
                    self.processor.save_pretrained(target)
            for form in wanted:
                form.finish(artifact, target)
            write_store(Store(self.weights, artifact.others, manifest, artifact.adapters), target)

        write_directory(Path(directory), fill, overwrite=overwrite)
        return tuple(notes)

    def export_onnx(
        self, directory: str | Path, ops: str = "matmulnbits", mode: str = "faithful"
    ) -> tuple[str, ...]:
        """Write ONNX graphs with their configuration and processor; `gracec.load(directory,
        backend="onnx")` runs them.

        Args:
            ops: "matmulnbits" (the operator of ONNX Runtime, which holds its accuracy level and has
                an INT4 kernel on GPUs) or "qdq" (standard ONNX).
            mode: "faithful" (kernels compute in float32) or "fast" (they round activations to 8
                bits).

        Returns:
            What the gates found, for a user to read; `onnx/session.json` has the figures.

        Raises:
            GracecError: if the directory exists, or the model has no ONNX graphs.
            GateError: if the graphs are not numerically what they should be.
        """
        form, artifact = Onnx(ops, mode), self._artifact()
        check_formats([form], artifact)
        notes: list[str] = []

        def fill(target: Path) -> None:
            self.model.config.save_pretrained(target)
            self.model.generation_config.save_pretrained(target)
            notes.extend(form.write(artifact, target / form.folder))
            form.finish(artifact, target)

        write_directory(Path(directory), fill)
        return tuple(notes)

    def _artifact(self) -> Artifact:
        return Artifact.of(
            self.model,
            self.weights,
            self.report,
            dtype=self.dtype,
            processor=self.processor,
            source=self.source,
        )


def check_formats(formats: Sequence[Format], artifact: Artifact) -> None:
    """Refuse formats that cannot hold an artifact.

    Where nothing is quantized, "hf" is an ordinary model, which needs no format.

    Raises:
        GracecError: with the first reason.
    """
    for form in formats:
        reason = form.refusal(artifact) if artifact.weights or form.folder else ""
        if reason:
            raise GracecError(reason, where=f"format {form.name}", fix="choose other formats")


def _lower(
    model: PreTrainedModel, weights: Mapping[str, FrozenWeight], dtype: torch.dtype, strict: bool
) -> Program:
    """Lower a model in place: its planned weights become packed tensors, shared with the graph.

    The graph is captured again, in the dtype that it runs in. The planned weights are stand-ins
    without memory meanwhile: a trace looks at shapes only.
    """
    for fqn, weight in weights.items():
        set_tensor(model, fqn, stand_in(weight.shape, dtype))
    # Not the buffers: rotary frequencies stay in float32. Copied in any case, since one view into
    # a checkpoint keeps the whole file mapped.
    for parameter in {*model.parameters()} - {model.get_parameter(fqn) for fqn in weights}:
        parameter.data = parameter.data.to(dtype, copy=True)
    model.requires_grad_(False)
    quantized = [ApplyCodes(weights), LowerTorchao(strict)] if weights else []
    result = run_passes(capture(model), [*quantized, Strip()])
    for target, names in result.program.fqns.items():
        if names[0] in weights:
            set_tensor(model, names[0], result.program.tensor(target))
    quantize_inputs(model, frozen_activations(result.program))
    result.program.notes = result.notes
    return result.program


def _lowering_gates(
    model: PreTrainedModel,
    lowered: Program,
    weights: Mapping[str, FrozenWeight],
    batch: Mapping[str, Tensor],
    reference: Tensor,
) -> dict[str, Any]:
    """Every gate on the lowered model; the figures go into the report."""
    family = family_of(model)
    inputs, own_inputs = family.prepare(model, batch), family.model_inputs(model, batch)
    packed = lowered_weights(lowered)
    figures: dict[str, Any] = {
        "matmul_error": gates.matmul_error(packed, weights),
        "int4_kernels": gates.int4_kernels_run(lowered, inputs, model, own_inputs),
        "lowered_equals_generating": captured_equals_eager(lowered, model),
    }
    mask = inputs["attention_mask"]
    with torch.no_grad():
        found = gates.logit_agreement(reference, lowered(**inputs)[0], mask)
        with CountInt4Kernels() as kernels, _dense_weights(model, packed, weights):
            logits = model(**own_inputs, use_cache=False).logits
    if kernels.count:
        raise GateError(f"{kernels.count} INT4 kernels ran among weights that are meant as dense")
    dense = gates.logit_agreement(reference, logits, mask)
    gates.lowered_is_as_good_as_dense(found, dense, reference.dtype)
    return {**figures, "logits": asdict(found), "logits_dense": asdict(dense)}


@contextmanager
def _dense_weights(
    model: PreTrainedModel, packed: Mapping[str, Tensor], weights: Mapping[str, FrozenWeight]
) -> Iterator[None]:
    """Run with the same values as dense weights, each for as long as its layer runs."""

    handles = fill_while_running(
        model,
        packed,
        lambda fqn: weights[fqn].dequantize(packed[fqn].dtype),
        lambda fqn: packed[fqn],
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
