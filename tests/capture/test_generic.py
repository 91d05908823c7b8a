from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaNextVideoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    VipLlavaConfig,
)

from gracec.capture import GENERIC, capture, captured_equals_eager, families, family_of
from gracec.errors import GracecError
from gracec.ir.program import annotation
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from tests.tiny import IMAGE, tiny_llava
from tests.tiny_families import SIGLIP, TEXT

CLIP = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}


def vipllava() -> PreTrainedConfig:
    text = {**TEXT, "model_type": "llama"}
    layers = {"vision_feature_layers": [-2, -1]}
    return VipLlavaConfig(vision_config=CLIP, text_config=text, image_token_index=IMAGE, **layers)


def llava_next_video() -> PreTrainedConfig:
    text = {**TEXT, "model_type": "llama"}
    return LlavaNextVideoConfig(vision_config=CLIP, text_config=text, image_token_index=IMAGE)


def built(make: Callable[[], PreTrainedConfig]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(make())
    module: torch.nn.Module = model
    module.eval()
    return model


def test_a_family_without_an_adapter() -> None:
    """Equal bits at several shapes, and the parts are found."""
    model = built(vipllava)
    assert model.config.model_type not in families()
    assert family_of(model) is GENERIC
    program = run_passes(capture(model), [AnalyzeModality()]).program
    assert captured_equals_eager(program, model) == 3
    parts = {annotation(node).get("part") for node in program.graph.nodes}
    assert {"vision", "projector", "decoder", "head"} <= parts
    batch = dict(GENERIC.example_batch(model))
    with pytest.raises(GracecError, match="it takes position_ids beside ids and pixels"):
        GENERIC.prepare(model, {**batch, "position_ids": batch["input_ids"]})


def test_what_blocks_a_model_is_said_in_one_line() -> None:
    model = built(llava_next_video)
    with pytest.raises(GracecError, match="encodes no image by itself.*'image_sizes'") as error:
        capture(model)
    assert "'llava_next_video' has no adapter" in str(error.value) and "\n" not in str(error.value)


def test_a_forward_that_fixes_a_size_is_refused() -> None:
    """The forward of LLaVA makes a Python list of images, as many as in the example."""
    model = tiny_llava()
    model.config.model_type = "other_vlm"
    with pytest.raises(GracecError, match="torch.export cannot trace the model") as error:
        capture(model)
    assert "'other_vlm' has no adapter" in str(error.value) and "\n" not in str(error.value)
