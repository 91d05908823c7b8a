from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gracec import ir
from gracec.capture import capture
from gracec.errors import GracecError
from gracec.models.loading import load_model
from gracec.models.skeleton import model_without_weights
from gracec.models.ties import untie_head
from gracec.passes import parse_pipeline, run_passes
from tests.tiny import tiny_llava


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


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model, name = tiny_llava(), "model.vision_tower.post_layernorm.weight"
    with torch.no_grad():
        model.get_parameter(name)[-1] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(GracecError, match=f"{name} holds NaN or infinity; check the checkpoint"):
        load_model(tmp_path)
