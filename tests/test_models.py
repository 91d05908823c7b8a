from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gracec import ir
from gracec.capture import capture
from gracec.errors import GracecError
from gracec.models import load_model, model_without_weights
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
