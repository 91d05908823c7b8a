import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import gracec
from gracec import ir
from gracec.capture import capture
from gracec.errors import GracecError
from gracec.models import load_model, model_without_weights, untie_head
from gracec.passes import parse_pipeline, run_passes
from tests.tiny import tiny_llava, tiny_processor


@pytest.mark.parametrize("tie", [True, False])
def test_a_model_without_weights_is_captured_and_planned_as_the_real_one(
    tie: bool, tmp_path: Path
) -> None:
    tiny_llava(tie=tie, dtype=torch.bfloat16).save_pretrained(tmp_path)
    stand_in = model_without_weights(tmp_path)
    for name, parameter in stand_in.named_parameters():
        assert parameter.untyped_storage().nbytes() == 2, name
    pipeline = parse_pipeline("analyze-modality,plan-quantization")
    texts = [
        ir.format(run_passes(capture(model), pipeline).program)
        for model in (stand_in, load_model(tmp_path))
    ]
    assert texts[0] == texts[1]


def test_a_model_without_weights_needs_no_checkpoint(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    llava.config.save_pretrained(tmp_path)
    stand_in = model_without_weights(tmp_path)
    assert {n: p.shape for n, p in stand_in.named_parameters()} == {
        n: p.shape for n, p in llava.named_parameters()
    }
    with pytest.raises(GracecError, match="no weights"):
        load_model(tmp_path)


def test_float16_is_widened_on_the_cpu(tmp_path: Path) -> None:
    tiny_llava(dtype=torch.float16).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.dtype == model_without_weights(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_a_tied_head_gets_a_parameter_of_its_own(batch: dict[str, Tensor]) -> None:
    model = tiny_llava(tie=True)
    expected = model(**batch).logits
    table = model.get_input_embeddings().weight
    assert untie_head(model)
    head = model.get_output_embeddings().weight
    assert head is not table
    assert head.data_ptr() == table.data_ptr()  # no memory until one is replaced
    assert not model.config.tie_word_embeddings
    assert not model.config.text_config.tie_word_embeddings
    model.tie_weights()
    assert model.get_output_embeddings().weight is head
    assert torch.equal(model(**batch).logits, expected)
    assert not untie_head(model)
    assert not untie_head(tiny_llava(tie=False))


def adapted(llava: LlavaForConditionalGeneration) -> PeftModel:
    """A LoRA on the attention of the decoder whose adapters are not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    model = get_peft_model(copy.deepcopy(llava), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


def test_a_lora_is_merged(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = adapted(llava)
    with torch.no_grad():
        expected = model(**batch).logits
        assert not torch.allclose(expected, llava(**batch).logits, atol=1e-3)
    compiled = gracec.compile(model, "w4a16-ptq", processor=tiny_processor())
    assert "adapters of PEFT merged into the weights: default" in compiled.report.notes
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
    inside = copy.deepcopy(llava)
    inside.add_adapter(LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))
    with pytest.raises(GracecError, match="adapters of PEFT are inside the model"):
        gracec.compile(inside, "w4a16-ptq")
