from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import gracec
from gracec import compiler
from gracec.compiled import CompiledModel
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.journal import Equal, Journal, Kernels
from gracec.kernels.torchao import CountInt4Kernels, Int4OpaqueTensor
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.stages import examine
from gracec.stages.examine import Exam
from gracec.targets.base import Runtime
from gracec.targets.torchao import Torchao
from tests.stages.test_examine import SAMPLES, answered
from tests.tiny import tiny_llava, tiny_processor


@pytest.fixture(scope="module")
def compiled(llava: LlavaForConditionalGeneration) -> CompiledModel:
    return gracec.compile(llava, "w4a16-ptq", processor=tiny_processor())


def test_every_gate_is_in_the_report(compiled: CompiledModel) -> None:
    found = compiled.report.gates
    assert found["captured_equals_eager"] == Equal(3, "batches")
    assert found["frozen_equals_fake_quantized"] == Equal(1, "outputs")
    assert found["int4_kernels"] == Kernels(14, len(compiled.weights))
    assert found["lowered_equals_generating"] == Equal(3, "batches")
    assert 0 < found["matmul_error"].value < found["matmul_error"].bound == 1e-2
    assert found["logits"].top1_clear == 1.0
    assert found["logits"].kl < found["logits"].bound


def test_the_callers_model_is_not_changed(
    compiled: CompiledModel, llava: LlavaForConditionalGeneration
) -> None:
    fresh = tiny_llava(tie=True)
    for (name, tensor), other in zip(
        fresh.state_dict().items(), llava.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    assert llava.dtype == torch.float32


def test_generate_runs_on_int4_kernels_and_nothing_planned_is_float(
    compiled: CompiledModel, batch: dict[str, Tensor]
) -> None:
    for fqn in compiled.weights:
        assert isinstance(compiled.model.get_parameter(fqn), Int4OpaqueTensor)
        assert compiled.model.get_parameter(fqn) is compiled.program.tensor(f"model.{fqn}")
    with CountInt4Kernels() as kernels:
        tokens = compiled.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=[])
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 3
    assert kernels.count == 3 * len(compiled.weights)


def test_calling_it_gives_the_logits_that_generate_follows(
    compiled: CompiledModel, batch: dict[str, Tensor]
) -> None:
    logits = compiled(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, 128)
    one = {name: tensor[1:] for name, tensor in batch.items()}  # no padding: positions agree
    tokens = compiled.generate(**one, max_new_tokens=1, do_sample=False)
    assert tokens[0, -1] == compiled(**one).logits[0, -1].argmax()


def test_sizes_count_every_parameter(
    compiled: CompiledModel, llava: LlavaForConditionalGeneration
) -> None:
    total = sum(parameter.numel() for parameter in llava.parameters())
    quantized = sum(weight.codes.numel() for weight in compiled.weights.values())
    sizes = compiled.report.sizes
    assert sizes["float32"] == 4 * total
    assert sizes["compiled"] < sizes["bfloat16"] - quantized


def test_a_saved_model_reloads_to_the_same_codes_logits_and_tokens(
    compiled: CompiledModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    compiled.save_pretrained(tmp_path / "out")
    again = gracec.load(tmp_path / "out")
    for fqn, weight in compiled.weights.items():
        assert torch.equal(again.weights[fqn].codes, weight.codes)
        assert torch.equal(again.weights[fqn].scales, weight.scales)
    assert torch.equal(again(**batch).logits, compiled(**batch).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(**batch, **options), compiled.generate(**batch, **options))
    assert again.report.to_dict() == compiled.report.to_dict()
    text = again.processor.batch_decode(again.generate(**batch, **options))
    assert len(text) == 2
    with pytest.raises(GracecError, match="the output directory exists"):
        compiled.save_pretrained(tmp_path / "out")


def test_a_float32_recipe_verifies_the_kernels(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    recipe = tmp_path / "verify.yaml"
    recipe.write_text(
        "weights: {decoder: {group_size: 32}, projector: {group_size: 32}}\n"
        "deploy: {dtype: float32}\n"
    )
    compiled = gracec.compile(llava, recipe)
    assert compiled.dtype == torch.float32
    assert compiled.report.gates["matmul_error"].value < 1e-5
    assert compiled.report.gates["logits"].kl < 1e-9
    assert "model.multi_modal_projector.linear_1.weight" in compiled.weights


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_is_quantized_and_the_embedding_is_kept(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor], tmp_path: Path, bits: int
) -> None:
    weights = {"decoder": {"group_size": 32}, "head": {"bits": bits, "group_size": 64}}
    recipe = Recipe.from_dict({"name": "head", "weights": weights})
    compiled = gracec.compile(llava, recipe, processor=tiny_processor())
    assert "lm_head.weight" in compiled.weights
    assert "the head was tied to the token embedding" in compiled.report.notes[0].text
    table = compiled.model.get_input_embeddings().weight
    assert torch.equal(table, llava.get_input_embeddings().weight.to(torch.bfloat16))
    assert llava.config.tie_word_embeddings  # the caller's model is as it was
    assert llava.get_output_embeddings().weight is llava.get_input_embeddings().weight
    parameters = sum(parameter.numel() for parameter in llava.parameters())
    assert compiled.report.sizes["float32"] == 4 * parameters
    compiled.save_pretrained(tmp_path / "out")
    again = gracec.load(tmp_path / "out")
    assert torch.equal(again(**batch).logits, compiled(**batch).logits)
    codes = [model.weights["lm_head.weight"].codes for model in (again, compiled)]
    assert torch.equal(*codes)


def test_an_existing_output_directory_is_refused_before_any_work(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    with pytest.raises(GracecError, match="the output directory exists"):
        gracec.compile(llava, output_dir=tmp_path)


def test_strict_refuses_a_fallback(llava: LlavaForConditionalGeneration) -> None:
    with pytest.raises(GracecError, match="group 128 does not divide the width 64"):
        gracec.compile(llava, "w4a16-ptq", strict=True)


def test_a_model_that_answers_too_badly_is_not_handed_over(
    compiled: CompiledModel, llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    exam = Exam(None, {}, failure=GateError("accuracy is 0.00%"))
    made = compiled.frozen, compiled.runtime
    for output_dir in (None, tmp_path / "out"):
        request = Request.checked(llava, "w4a16-ptq", output_dir=output_dir)
        with pytest.raises(GateError, match=r"accuracy is 0\.00%"):
            compiler.publish(*made, exam, request, Journal())
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


class Rounding(Torchao):
    """As if its kernels rounded more than the codes do, unless they are told not to."""

    name = "rounding"

    def exact(self, runtime: Runtime, frozen: Frozen) -> Frozen | None:
        faithful = frozen.onnx.model_copy(update={"mode": "faithful"})
        return replace(frozen, onnx=faithful) if frozen.onnx != faithful else None


@pytest.mark.parametrize(("exact", "taken"), [(4, True), (0, False)])
def test_a_model_that_loses_answers_by_rounding_is_lowered_again(
    llava: LlavaForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
    exact: int,
    taken: bool,
) -> None:
    answers = iter([answered(4), answered(0), answered(exact)])  # original, compiled, again
    monkeypatch.setattr(examine, "evaluate_vqa", lambda *arguments, **options: next(answers))
    made = gracec.compile(
        llava, "w4a16-ptq", target=Rounding(), eval_data=SAMPLES, processor=tiny_processor()
    )
    assert next(answers, None) is None
    assert made.report.accuracy["compiled"]["overall"]["accuracy"] == exact / 4
    said = "lowered again without rounding, which costs too much: accuracy is lower by 100.0"
    assert any(said in note.text for note in made.report.notes) == taken
    assert made.frozen.onnx.mode == ("faithful" if taken else "auto")
    assert made.report.recipe["deploy"].get("onnx", {}).get("mode", "auto") == made.frozen.onnx.mode
