"""LoRA adapters of PEFT: merged, or kept in float beside quantized weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
    LlavaForConditionalGeneration,
)

import gracec
from gracec.capture import capture, captured_equals_eager
from gracec.capture.eager import eager_logits
from gracec.compiled import CompiledModel
from gracec.errors import GateError, GracecError
from gracec.frozen import dense_twin
from gracec.gates import logit_agreement
from gracec.ir.program import Program
from gracec.kernels.torchao import CountInt4Kernels
from gracec.models.lora import LoraLinear, adapter_tensors, attach_adapters
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.passes.select_supervised import SelectSupervised
from gracec.recipe import Recipe
from gracec.stages.peft import keep_adapters, merge_adapters
from tests.backends.artifacts import artifact_of, logits_of, tokens_of
from tests.tiny import tiny_image, tiny_llava, tiny_processor

Batch = dict[str, Tensor]
EVERYWHERE = ["q_proj", "down_proj", "linear_1"]
ATTENTION = r".*language_model.*\.(q|v)_proj"
WEIGHTS = {part: {"group_size": 32} for part in ("projector", "decoder")}
RECIPE = Recipe.from_dict(
    {
        "name": "lora",
        "weights": WEIGHTS,
        "calibration": {"method": "weights"},
        "deploy": {"dtype": "float32"},
    }
)


def adapted(model: LlavaForConditionalGeneration, **options: Any) -> PeftModel:
    """A LoRA on a copy of the model, in eval mode, whose adapters are not zero."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_dropout": 0.5, "target_modules": ATTENTION, **options}
    found = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    for name, parameter in found.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.normal_(std=0.05)
    return found.eval()


@pytest.fixture(scope="module")
def peft(llava: LlavaForConditionalGeneration) -> PeftModel:
    """In every part, some of another rank and scaling. Not to be changed."""
    ranks = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"linear_1": 6}}
    return adapted(llava, target_modules=EVERYWHERE, lora_alpha=5, **ranks)


@pytest.fixture(scope="module")
def compiled(peft: PeftModel) -> CompiledModel:
    """Not to be changed."""
    return gracec.compile(peft, RECIPE, processor=tiny_processor(), adapters="float")


def test_a_lora_is_merged(
    llava: LlavaForConditionalGeneration, batch: Batch, tmp_path: Path
) -> None:
    model = adapted(llava)
    with torch.no_grad():
        expected = model(**batch).logits
        assert not torch.allclose(expected, llava(**batch).logits, atol=1e-3)
    compiled = gracec.compile(model, "w4a16-ptq", processor=tiny_processor())
    assert "adapters of PEFT merged into the weights: default" in map(str, compiled.report.notes)
    found = compiled(**batch).logits
    by_hand = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(found, gracec.compile(by_hand, "w4a16-ptq")(**batch).logits)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)  # the caller's is as it was
    compiled.save_pretrained(tmp_path / "out")
    assert torch.equal(gracec.load(tmp_path / "out")(**batch).logits, found)

    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        GracecError, match="holds an adapter of PEFT, not a model; load it with peft"
    ):
        gracec.compile(tmp_path / "adapter", "w4a16-ptq")


def test_adapters_inside_a_model_are_refused(llava: LlavaForConditionalGeneration) -> None:
    inside = copy.deepcopy(llava)
    try:
        inside.add_adapter(LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))
    except ValueError as error:
        pytest.skip(f"transformers says: {error}")
    with pytest.raises(GracecError, match="adapters of PEFT are inside the model"):
        gracec.compile(inside, "w4a16-ptq")


@pytest.mark.parametrize("place", ["lm_head", "embed_tokens", "both", "head of its own"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_merged_into_tied_weights_computes_what_peft_does(
    place: str, inplace: bool, batch: Batch, tmp_path: Path
) -> None:
    """An adapter of one of them must not change the other."""
    targets = ["lm_head", "embed_tokens"] if place == "both" else [place]
    options: dict[str, Any] = {"target_modules": targets}
    if place == "head of its own":
        options = {"modules_to_save": ["lm_head"]}
    model = adapted(tiny_llava(tie=True), **options)
    if place == "head of its own":
        model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    model.train(not inplace)
    expected = eager_logits(model, batch)
    merged, _, error = merge_adapters(model, inplace=inplace)
    assert error.value <= 1e-5
    assert torch.allclose(eager_logits(merged, batch), expected, atol=1e-4 * expected.abs().max())
    if inplace or place != "both":
        return
    assert model.training
    compiled = gracec.compile(model, RECIPE, output_dir=tmp_path / "out", formats=())
    assert compiled.report.gates["adapters_merged"].value == error.value
    agreement = logit_agreement(expected, compiled(**batch).logits, batch["attention_mask"])
    assert agreement.kl < 0.1
    loaded = gracec.load(tmp_path / "out")
    assert torch.equal(loaded(**batch).logits, compiled(**batch).logits)


def test_a_head_of_an_adapter_is_kept_beside_other_adapters(batch: Batch, tmp_path: Path) -> None:
    model = adapted(tiny_llava(tie=True), modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = eager_logits(model, batch)
    compiled = gracec.compile(
        model, RECIPE, adapters="float", output_dir=tmp_path / "out", formats=()
    )
    agreement = logit_agreement(expected, compiled(**batch).logits, batch["attention_mask"])
    assert agreement.kl < 0.1
    loaded = gracec.load(tmp_path / "out")
    assert torch.equal(loaded(**batch).logits, compiled(**batch).logits)


def test_a_merge_that_computes_something_else_is_found(
    llava: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gracec.stages.peft._part_adapted", lambda base: None)
    with pytest.raises(GateError, match=r"merged: the logits differ from those of PEFT by"):
        merge_adapters(adapted(tiny_llava(tie=True), target_modules=["lm_head"]))


def test_what_is_kept_computes_what_peft_does(batch: Batch) -> None:
    """In bfloat16 PEFT holds adapters in float32. A module that was trained as a whole stays."""
    model = adapted(tiny_llava(dtype=torch.bfloat16), modules_to_save=["multi_modal_projector"])
    trained = model.get_base_model().model.multi_modal_projector
    trained.modules_to_save["default"].linear_1.weight.data.mul_(2)
    with torch.no_grad():
        expected = logits_of(model, batch)  # type: ignore[arg-type]
    kept, note = keep_adapters(model)
    assert note == "adapters of PEFT kept in float: default, beside 4 linears"
    assert torch.equal(logits_of(kept, batch), expected)
    attention: Any = kept.get_submodule("model.language_model.layers.0.self_attn")
    assert attention.q_proj.lora_A.weight.dtype == torch.float32
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert captured_equals_eager(capture(kept), kept) == 3
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in kept.state_dict()
    assert not any("base_layer" in name or "modules_to_save" in name for name in kept.state_dict())


def test_the_weights_are_quantized_as_without_an_adapter(
    captured: Program, compiled: CompiledModel
) -> None:
    """Of the same names and parts, to the same codes; adapters are listed beside them."""
    alone = run_passes(captured, [AnalyzeModality(), PlanQuantization(RECIPE)]).program
    parts = {entry.fqn: entry.part for entry in plan_of(alone).entries}
    rows = {row.fqns[0]: row for row in compiled.report.plan}
    adapters = set(adapter_tensors(artifact_of(compiled).adapters))
    assert len(adapters) == 2 * 7
    assert {fqn: row.part for fqn, row in rows.items() if fqn not in adapters} == parts
    reasons = {rows[fqn].reason for fqn in adapters if rows[fqn].part != "unused"}
    assert reasons == {"adapter: kept in float beside its linear"}
    note = "adapters of PEFT kept in float: default, beside 7 linears"
    assert str(compiled.report.notes[0]) == note
    weights = frozen_weights(run_passes(alone, [InsertFakeQuant(), Freeze()]).program)
    assert "model.multi_modal_projector.linear_1.weight" in weights
    assert weights.keys() == compiled.weights.keys()
    for fqn, weight in weights.items():
        assert torch.equal(weight.codes, compiled.weights[fqn].codes)


def test_int4_kernels_generate_the_tokens_of_the_codes(
    peft: PeftModel, compiled: CompiledModel, batch: Batch, tmp_path: Path
) -> None:
    assert compiled.report.gates["captured_equals_eager"].count == 3
    options = {"max_new_tokens": 6, "do_sample": False}
    with CountInt4Kernels() as kernels:
        tokens = compiled.generate(**batch, **options)
    assert kernels.count
    dense = dense_twin(artifact_of(compiled), torch.float32)
    assert torch.equal(tokens, tokens_of(dense, batch))
    logits = compiled(**batch).logits
    torch.testing.assert_close(logits, logits_of(dense, batch), rtol=1e-4, atol=1e-4)
    for module in dense.modules():
        if isinstance(module, LoraLinear):
            module.scaling = 0.0
    assert not torch.allclose(logits, logits_of(dense, batch), atol=1e-2)  # they count

    compiled.save_pretrained(tmp_path / "out", ())
    again = gracec.load(tmp_path / "out")
    assert torch.equal(again(**batch).logits, logits)
    assert torch.equal(again.generate(**batch, **options), tokens)
    again.save_pretrained(tmp_path / "twice", ())
    stored = "gracec/gracec.safetensors"
    texts = [(tmp_path / name / stored).read_bytes() for name in ("out", "twice")]
    assert texts[0] == texts[1]
    merged = peft.get_base_model()  # the caller's is as it was
    assert hasattr(merged.get_submodule("model.multi_modal_projector.linear_1"), "base_layer")


def test_other_libraries_load_weights_and_adapters(
    compiled: CompiledModel, batch: Batch, tmp_path: Path
) -> None:
    notes = compiled.save_pretrained(tmp_path / "out", "hf,torchao")
    assert "hf: the adapters are in adapter, for peft.PeftModel.from_pretrained" in notes
    dense = dense_twin(artifact_of(compiled), torch.float32)
    dequantize = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    for folder, options in (("", {}), ("", dequantize), ("torchao", {})):
        directory = tmp_path / "out" / folder
        base, info = AutoModelForImageTextToText.from_pretrained(
            directory, output_loading_info=True, **options
        )
        assert not any(info.values())
        if not folder and not options:  # what is packed becomes a weight when it runs
            logits_of(base, batch)
        loaded = PeftModel.from_pretrained(base, directory / "adapter").eval()
        assert torch.equal(logits_of(loaded, batch), logits_of(dense, batch))  # type: ignore[arg-type]


def test_onnx_runtime_generates_the_same_tokens(
    compiled: CompiledModel, batch: Batch, tmp_path: Path
) -> None:
    compiled.export_onnx(tmp_path / "out", mode="faithful")
    options = {"max_new_tokens": 5, "do_sample": False}
    found = gracec.load(tmp_path / "out", backend="onnx").generate(**batch, **options)
    assert torch.equal(found, compiled.generate(**batch, **options))


def test_adapters_train_with_their_part(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    """The tower is frozen by default, and its adapters with it."""
    fields = {"steps": 1, "lr": 1e-2, "warmup": 0.0, "keep": "last", "batch_size": 2}
    training = {**fields, "distillation": {"kind": "none", "omega": 0}}
    recipe = Recipe.from_dict({**RECIPE.to_dict(), "training": training})
    records = [
        {"image": tiny_image(number), "question": "what is this ?", "answer": answer}
        for number, answer in enumerate(("red circle", "two", "no"))
    ]
    model = adapted(llava, target_modules=["q_proj"])
    compiled = gracec.compile(
        model,
        recipe,
        train_data=records,
        processor=tiny_processor(),
        output_dir=tmp_path / "out",
        adapters="float",
        progress=False,
    )
    before, _ = keep_adapters(model)
    names = adapter_tensors(artifact_of(compiled).adapters)
    assert len(names) == 8
    again = gracec.load(tmp_path / "out").model
    for fqn in names:
        trained = compiled.model.get_parameter(fqn)
        moved = not torch.equal(trained, before.get_parameter(fqn))
        assert moved == ("language_model" in fqn), fqn
        assert torch.equal(again.get_parameter(fqn), trained)


def test_what_an_adapter_adds_is_no_residual(llava: LlavaForConditionalGeneration) -> None:
    """Of a projector or a head, through which every path leads."""
    kept, _ = keep_adapters(adapted(llava, target_modules=["lm_head", "linear_2"]))
    program = run_passes(capture(kept), [AnalyzeModality()]).program
    assert len(list(program.nodes(role="block_output"))) == 2
    counts = [len(list(program.nodes(part=part))) for part in ("projector", "decoder", "head")]
    assert counts == [2 + 2, 14, 1 + 2]
    with pytest.raises(GracecError, match=r"the head has an adapter in float.*merge it") as error:
        run_passes(program, [SelectSupervised()])
    assert "\n" not in str(error.value)


def test_what_is_not_kept_in_float_is_refused(
    llava: LlavaForConditionalGeneration, peft: PeftModel, tmp_path: Path
) -> None:
    def refused(model: Any, message: str, recipe: Any = RECIPE, **options: Any) -> None:
        with pytest.raises(GracecError, match=message) as error:
            gracec.compile(model, recipe, adapters="float", **options)
        assert "\n" not in str(error.value)

    refused(llava, "the model has no LoRA adapters")
    refused(tmp_path, "the model has no LoRA adapters")
    refused(peft, 'recipe quantizes no weight .*; compile with adapters="merge"', "bf16-sft")
    refused(peft, "quantizes activations, and an adapter takes them in float", "w8a8")
    refused(
        *(peft, "format awq: adapters are kept in float, which .* compile with adapters"),
        output_dir=tmp_path / "out",
        formats="hf,awq",
    )
    with pytest.raises(GracecError, match="unknown adapters 'both'; use merge or float"):
        gracec.compile(peft, RECIPE, adapters="both")  # type: ignore[call-overload]

    name = r"model\.language_model\.layers\.0\.self_attn\.q_proj: "
    dora = adapted(llava, use_dora=True)
    refused(dora, rf"{name}the adapter is a variant of LoRA \(DoraLinearVariant\).*\"merge\"")
    assert merge_adapters(dora)[1] == "adapters of PEFT merged into the weights: default"
    refused(adapted(llava, lora_bias=True), f"{name}the adapter has a bias")
    table = adapted(llava, target_modules=["embed_tokens"])
    refused(table, r"embed_tokens: the adapter is a Embedding of PEFT on a Embedding")
    two = adapted(llava)
    two.add_adapter("other", LoraConfig(r=2, target_modules=ATTENTION))
    two.base_model.set_adapter(["default", "other"])
    refused(two, f"{name}2 adapters are active at once")
    merged = adapted(llava)
    merged.merge_adapter()
    refused(merged, f"{name}the adapter is merged already")
    scaled = get_peft_model(
        copy.deepcopy(llava), IA3Config(target_modules=ATTENTION, feedforward_modules=[])
    )
    refused(scaled, f"{name}the adapter is a Linear of PEFT on a Linear")


def test_an_adapter_that_computes_something_else_is_found(
    llava: LlavaForConditionalGeneration,
) -> None:
    model = adapted(llava)
    with model.disable_adapter(), pytest.raises(GateError, match="differ from those of PEFT by"):
        keep_adapters(model)


def test_places_without_tensors_are_refused(llava: LlavaForConditionalGeneration) -> None:
    name = "model.language_model.layers.0.self_attn.q_proj"
    low = torch.zeros(4, 64)
    with pytest.raises(GracecError, match=r"adapter of .*q_proj: .*lora_B.weight is missing"):
        attach_adapters(copy.deepcopy(llava), {name: 1.0}, {f"{name}.lora_A.weight": low})
    tensors = {"there.lora_A.weight": low, "there.lora_B.weight": low.T}
    with pytest.raises(GracecError, match="the model has no such linear"):
        attach_adapters(copy.deepcopy(llava), {"there": 1.0}, tensors)
