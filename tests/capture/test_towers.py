"""LLaVA with towers other than CLIP, and what is said of those that are not captured."""

import pytest
import torch
from transformers import (
    Dinov2Config,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from gracec.capture import capture, captured_equals_eager, family_of
from gracec.capture.eager import eager_logits
from gracec.errors import GracecError
from tests.tiny import IMAGE, TEXT, tiny_config

SHARED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {
    name: getattr(tiny_config().vision_config, name)
    for name in (*SHARED, "image_size", "patch_size")
}


def llava(vision: PreTrainedConfig, strategy: str) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_config().text_config,
        image_token_id=IMAGE,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("strategy", "tokens"), [("full", 16), ("default", 15)])
def test_a_tower_without_a_class_token(strategy: str, tokens: int) -> None:
    """Nothing stands before the patches: "default" drops one of them, as transformers does."""
    model = llava(SiglipVisionConfig(**SIZES), strategy)
    batch = family_of(model).example_batch(model, batch=1, images=1)
    assert int((batch["input_ids"] == IMAGE).sum()) == tokens
    assert captured_equals_eager(capture(model), model) == 3
    assert eager_logits(model, batch).isfinite().all()


def test_a_tower_that_is_not_known_is_named() -> None:
    model = llava(Dinov2Config(**SIZES), "full")
    message = "the tower is a 'dinov2', which is not known here; clip_vision_model, pixtral, siglip"
    with pytest.raises(GracecError, match=message):
        family_of(model).example_batch(model)


def test_a_family_without_an_adapter_whose_tower_has_no_size_is_named() -> None:
    vision = {"embed_dim": [32], "num_heads": [2], "num_groups": [2], "depths": [1]}
    vision |= {"patch_size": [7], "patch_stride": [4], "patch_padding": [3]}
    text = {**TEXT, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = Florence2Config(
        vision_config={**vision, "patch_prenorm": [False], "projection_dim": 64},
        text_config=text,
        image_token_id=IMAGE,
    )
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(config)
    message = "the family 'florence2' has no adapter, .* the configuration of the tower says no"
    with pytest.raises(GracecError, match=message) as error:
        family_of(model).example_batch(model)
    assert "\n" not in str(error.value)
