"""Qwen3.5 with routed experts."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3_5MoeConfig

from gracec.capture import capture, captured_equals_eager
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from tests.tiny_families import QWEN_IDS, qwen3_5


@pytest.mark.slow
def test_linear_attention_before_routed_experts() -> None:
    config: Any = qwen3_5()
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    for fields in (text, vision):
        fields.pop("model_type")
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text |= {"shared_expert_intermediate_size": 32}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    program = run_passes(capture(model), [AnalyzeModality()]).program
    assert captured_equals_eager(program, model) == 3
    assert blocks_equal_hidden_states(program, model) == 2
    routers = list(program.nodes(role="router"))
    assert len(routers) == 3
