"""Tiny random models whose decoders have routed experts: the real classes, few experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AriaConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
)

from tests import tiny
from tests.tiny import IMAGE, IMAGE_SIZE, PATCH_SIZE, TEXT
from tests.tiny_families import MROPE, QWEN_IDS, qwen_processor

EXPERTS, CHOSEN, BLOCKS = 4, 2, 3
_TEXT: dict[str, Any] = {**TEXT, "num_hidden_layers": BLOCKS}
_QWEN: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def llava_mixtral(layers: int = 2) -> PreTrainedConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
        initializer_factor=4.0,
    )
    text = MixtralConfig(
        **{**_TEXT, "num_hidden_layers": layers},
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def internvl_qwen3_moe() -> PreTrainedConfig:
    """The second block is an ordinary one."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8]}
    vision |= {"initializer_range": 0.2}
    text = {**_TEXT, **_QWEN, "mlp_only_layers": [1], "model_type": "qwen3_moe"}
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def qwen3_vl_moe() -> PreTrainedConfig:
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0, 1]
    text = {**_TEXT, **_QWEN, "rope_parameters": MROPE}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def aria() -> PreTrainedConfig:
    """Experts beside one that is always asked; their weights lie with the outputs last."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {**_TEXT, "moe_num_experts": EXPERTS, "moe_topk": CHOSEN, "moe_num_shared_experts": 1}
    return AriaConfig(
        vision_config={**vision, "model_type": "idefics3_vision"},
        text_config={**text, "model_type": "aria_text", "intermediate_size": 64},
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )


CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llava_mixtral": llava_mixtral,
    "internvl_qwen3_moe": internvl_qwen3_moe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "aria": aria,
}


def tiny_experts(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """A random model in eval mode; the global random state is left as it was.

    Args:
        options: of the function that makes the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(CONFIGS[name](**options))
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    module: torch.nn.Module = model
    module.to(dtype).eval()
    return model


def tiny_processor(name: str) -> Any:
    """A processor whose pictures and placeholders are those of `tiny_experts`.

    InternVL and Aria have none that needs no network or torchvision; that of LLaVA takes pictures
    of the same size, with as many placeholders as it is told.
    """
    if name == "qwen3_vl_moe":
        return qwen_processor(Qwen3VLProcessor)
    found: Any = tiny.tiny_processor()
    if name in ("internvl_qwen3_moe", "aria"):
        found.patch_size, found.num_additional_image_tokens = 2 * PATCH_SIZE, 1
    return found
