"""Recipes that quantize activations, from samples to graphs that ONNX Runtime runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.backends.onnx.format import Onnx
from gracec.compiled import CompiledModel
from gracec.errors import GracecError, GracecWarning
from gracec.evaluate import evaluate_vqa, load_samples
from gracec.passes.freeze import QUANTIZE_DEQUANTIZE
from tests.signed import negated_by_halves
from tests.tiny import tiny_image, tiny_processor

STUDENT = Path(__file__).parents[1] / "examples/emojivqa/student"
RECORDS = [
    {"image": tiny_image(number), "question": "what color is this ?", "answer": word}
    for number, word in enumerate(("red", "green", "blue", "yellow"))
]


def compile(model: Any, recipe: str, **options: Any) -> CompiledModel:
    return gracec.compile(model, recipe, processor=tiny_processor(), progress=False, **options)


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def quantized(request: pytest.FixtureRequest, llava: LlavaForConditionalGeneration) -> Any:
    return compile(llava, request.param, train_data=RECORDS)


def test_it_generates_and_reloads_as_the_graph_computes(
    quantized: CompiledModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    assert quantized.report.gates["lowered_equals_generating"].count == 3
    assert list(quantized.program.nodes(QUANTIZE_DEQUANTIZE))
    with pytest.raises(GracecError, match="format hf: the input of .* is quantized, which the"):
        quantized.save_pretrained(tmp_path / "hf")
    quantized.save_pretrained(tmp_path / "plain", formats=())
    found = gracec.load(tmp_path / "plain")
    assert torch.equal(found(**batch).logits, quantized(**batch).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = found.generate(**batch, **options)
    assert torch.equal(tokens, quantized.generate(**batch, **options))
    for fqn, weight in quantized.weights.items():
        other = found.weights[fqn].activation
        assert weight.activation is not None and other is not None
        assert weight.activation.equals(other)


def test_what_is_refused(llava: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    for recipe in ("w8a8", "w4a8"):
        with pytest.raises(GracecError, match="activations need samples to calibrate on"):
            compile(llava, recipe)
    with pytest.raises(GracecError, match="does not train, so teacher would be ignored"):
        compile(llava, "w8a8", train_data=RECORDS, teacher=llava)
    with pytest.raises(GracecError, match="format hf: .*activations, which .* --format onnx"):
        compile(llava, "w8a8", train_data=RECORDS, output_dir=tmp_path / "never")


def test_a_sample_that_does_not_calibrate_is_reported(llava: LlavaForConditionalGeneration) -> None:
    broken = {**RECORDS[0], "question": "what <image> is <pad> this ?"}
    with pytest.warns(GracecWarning, match="control token"):
        notes = compile(llava, "w8a8", train_data=[*RECORDS, broken]).report.notes
    (note,) = [note for note in notes if note.source == "calibration"]
    assert "'<pad>', a control token" in note.text


TEXTS = [{"question": f"what is {word} ?", "answer": word} for word in ("red", "green", "blue")]


@pytest.mark.slow
def test_texts_calibrate_the_decoder_and_leave_the_tower_alone(
    quantized: CompiledModel, llava: LlavaForConditionalGeneration
) -> None:
    """The scales of the image side are those of the pictures, wherever texts stand."""
    recipe = quantized.report.recipe["name"]
    mixed = compile(llava, recipe, train_data=[TEXTS[0], *RECORDS, *TEXTS[1:]])
    same = {
        fqn: weight.activation.equals(mixed.weights[fqn].activation)
        for fqn, weight in quantized.weights.items()
        if weight.activation is not None
    }
    assert len(same) > 4
    assert all(same.values()) == (recipe == "w8a8")


@pytest.mark.slow
def test_texts_alone_do_not_calibrate_a_tower(llava: LlavaForConditionalGeneration) -> None:
    with pytest.raises(GracecError, match="observed nothing; calibrate on data with pictures"):
        compile(llava, "w8a8", train_data=TEXTS)
    assert compile(llava, "w4a8", train_data=TEXTS).weights


@pytest.mark.slow
def test_onnx_runtime_runs_it_in_integers(
    quantized: CompiledModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    quantized.export_onnx(tmp_path / "out", mode="faithful")
    folder = tmp_path / "out" / "onnx"
    session = json.loads((folder / "session.json").read_text())
    figures = session["gates"]
    assert figures["composed_equals_training"] <= 1e-5
    assert figures["matmul_error"] <= 1e-5
    assert figures["greedy"]["different"] == 0
    vision = quantized.report.recipe["name"] == "w8a8"
    name = "vision_encoder_int8.onnx" if vision else "decoder_model_merged_q4.onnx"
    graph = onnx.load(str(folder / name)).graph
    rounded = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    if vision:
        assert figures["int8_kernels"] == 8 and figures["int4_kernels"] == 0
        assert session["kernels"] == {"vision_encoder": 8, "embed_tokens": 0, "decoder": 0}
        assert rounded == 6
    else:
        assert figures["int4_kernels"] == 14 and "int8_kernels" not in figures
        assert rounded == 8
    found = gracec.load(tmp_path / "out", backend="onnx").generate(**batch, max_new_tokens=4)
    assert found.shape == (2, batch["input_ids"].shape[1] + 4)
    quantized.export_onnx(tmp_path / "other", ops="matmulnbits", mode="faithful")
    session = json.loads((tmp_path / "other/onnx/session.json").read_text())
    for gate in ("int4_kernels", "int8_kernels", "greedy"):
        assert session["gates"].get(gate) == figures.get(gate)
    other = gracec.load(tmp_path / "other", backend="onnx").generate(**batch, max_new_tokens=4)
    assert torch.equal(other, found)


@pytest.mark.slow
def test_the_int8_kernel_multiplies_with_negative_scales(
    quantized: CompiledModel, tmp_path: Path
) -> None:
    weights = {fqn: negated_by_halves(weight) for fqn, weight in quantized.weights.items()}
    Onnx(mode="faithful").write(
        replace(quantized.frozen, weights=weights, reference=None), tmp_path
    )
    figures = json.loads((tmp_path / "session.json").read_text())["gates"]
    vision = quantized.report.recipe["name"] == "w8a8"
    assert figures["int8_kernels" if vision else "int4_kernels"] == len(weights)
    assert figures["matmul_error"] <= 1e-5 and figures["greedy"]["different"] == 0


@pytest.mark.slow
def test_training_sees_the_rounding(llava: LlavaForConditionalGeneration) -> None:
    fields = {
        "name": "test",
        "weights": {"decoder": {"group_size": 32}},
        "activations": {"decoder": {}},
        "training": {"steps": 2, "batch_size": 3, "lr": 1e-3, "scale_lr": 1e-2, "held_out": 0.25},
    }
    recipe = gracec.Recipe.from_dict(fields)
    trained = compile(llava, recipe, train_data=RECORDS)
    assert trained.report.training["steps"] == 2
    plain = compile(
        llava, gracec.Recipe.from_dict({**fields, "training": None}), train_data=RECORDS
    )
    fqn = "model.language_model.layers.1.mlp.down_proj.weight"
    activations = [model.weights[fqn].activation for model in (trained, plain)]
    assert all(activation is not None for activation in activations)
    assert trained.report.training["best_step"] > 0
    assert not activations[0].equals(activations[1])


@pytest.mark.slow
def test_the_shipped_student_answers_with_an_int8_tower(tmp_path: Path) -> None:
    from emojivqa.packing import questions_of  # noqa: F401  (the example is importable)
    from make_dataset import write

    write("train", tmp_path / "train", 64)
    write("test", tmp_path / "test", 100)
    compiled = gracec.compile(STUDENT, "w8a8", train_data=tmp_path / "train", progress=False)
    compiled.export_onnx(tmp_path / "out")
    samples = load_samples(tmp_path / "test")
    model = gracec.load(tmp_path / "out", backend="onnx")
    original = gracec.models.load_model(STUDENT, torch.float32)
    scores = [
        evaluate_vqa(asked, compiled.processor, samples, blind=False).overall.accuracy
        for asked in (model, original)
    ]
    assert scores[0] >= scores[1] - 0.05
