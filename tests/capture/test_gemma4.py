"""What the larger models of Gemma 4 have and the smaller ones have not."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from gracec.capture import capture, captured_equals_eager, family_of
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.errors import GracecError
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from tests.tiny_families import gemma4, tiny_model

LARGER: dict[str, Any] = {
    "use_bidirectional_attention": "vision",
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {**EXPERTS, "moe_intermediate_size": 32}])
def test_images_both_ways_values_that_are_keys_and_experts(more: dict[str, Any]) -> None:
    config: Any = gemma4()
    fields = {**config.text_config.to_dict(), **LARGER, **more}
    for name in ("per_layer_config", "rope_parameters"):
        fields.pop(name, None)
    config.text_config = type(config.text_config)(**fields, global_head_dim=32)
    config.vision_config.standardize = True
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    tower = model.model.vision_tower
    tower.std_bias.fill_(0.1)
    tower.std_scale.fill_(0.5)
    program = run_passes(capture(model), [AnalyzeModality()]).program
    assert captured_equals_eager(program, model) == 3
    assert blocks_equal_hidden_states(program, model) == 1


def test_audio_is_refused() -> None:
    model = tiny_model("gemma4")
    family = family_of(model)
    batch = {**family.example_batch(model), "input_features": torch.zeros(1, 4, 8)}
    with pytest.raises(GracecError, match="audio is not captured") as error:
        family.prepare(model, batch)
    assert "\n" not in str(error.value)
