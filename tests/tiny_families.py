"""Tiny random models of every family and their processors: the real classes, as small as their
quantization allows."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4Processor,
    Glm4vConfig,
    Glm4vProcessor,
    Idefics2Config,
    Idefics2Processor,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    Lfm2VlConfig,
    Lfm2VlProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    Mistral3Config,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ImagesKwargs

from gracec.models import loading
from gracec.models.loading import images_only
from tests import tiny
from tests.tiny import (
    CHAT_TEMPLATE,
    IMAGE,
    PAD,
    SPECIAL_TOKENS,
    TEXT,
    VOCAB_SIZE,
    WORDS,
)

# It writes numbers of seconds into prompts about videos, and is not installed everywhere.
processing_smolvlm.num2words = processing_smolvlm.num2words or str

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MARKS = {
    "video_token": "<video>",
    "vision_start_token": "<vision_start>",
    "vision_end_token": "<vision_end>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"tile_{r}_{c}_token": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)},
}
"""Further special tokens, at the end of the vocabulary."""
VIDEO, VISION_START, VISION_END, *_ = range(VOCAB_SIZE - len(MARKS), VOCAB_SIZE)
QWEN_IMAGE = "<|image_pad|>"
"""transformers.js and onnxruntime-genai look for no other."""
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def qwen2_vl() -> PreTrainedConfig:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text = {**TEXT, "rope_parameters": MROPE}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def qwen2_5_vl() -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": MROPE}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def qwen_processor(cls: type) -> Any:
    images: Any = Qwen2VLImageProcessorPil
    build: Any = images_only(cls)  # a video processor needs torchvision
    return build(
        image_processor=images(
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 32 * 32, "longest_edge": 48 * 48},
        ),
        tokenizer=qwen_tokenizer(),
        chat_template=qwen_template(),
    )


def qwen_template() -> str:
    """Roles as they are: the Jinja of onnxruntime-genai has no filter `upper`."""
    found = template(f"<|vision_start|>{QWEN_IMAGE}<|vision_end|>")
    return found.replace(" | upper", "").replace("ASSISTANT", "assistant")


def qwen_tokenizer() -> Any:
    """The real class and names of special tokens; every character is a token."""
    special = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    special |= {QWEN_IMAGE: special.pop("<image>"), "<|video_pad|>": VIDEO}
    special |= {"<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END}
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ"]  # Ġ is a blank
    free = [number for number in range(VOCAB_SIZE) if number not in special.values()]
    names = [*characters, *(f"<{number}>" for number in free[len(characters) :])]
    build: Any = Qwen2Tokenizer
    return build(
        vocab=special | dict(zip(names, free, strict=True)),
        merges=[],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[name for name in special if "|" in name],
        padding_side="left",
    )


def idefics3(cls: type) -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    build: Any = cls
    config: PreTrainedConfig = build(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**vision, "initializer_range": 0.2},
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return config


def idefics3_processor(cls: type, images: type, *, tiles: int = 0) -> Any:
    """Args:
    tiles: along the longer side of a picture, which is cut into them.
    """
    build_images: Any = images
    without = images_only(cls)
    options: Any = {} if without is None else {"video_processor": None}
    build: Any = without or cls
    return build(
        **options,
        image_processor=build_images(
            size={"longest_edge": 32 * max(tiles, 1)},
            max_image_size={"longest_edge": 32},
            do_image_splitting=tiles > 0,
        ),
        tokenizer=tokenizer(),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


def llava_onevision() -> PreTrainedConfig:
    return LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64], [96, 96]],
        vision_aspect_ratio="anyres_max_4",
    )


def llava_onevision_processor() -> Any:
    images: Any = LlavaOnevisionImageProcessorPil
    build: Any = images_only(LlavaOnevisionProcessor)
    return build(
        image_processor=images(
            size={"height": 32, "width": 32},
            image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64], [96, 96]],
        ),
        tokenizer=tokenizer(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=template("<image>"),
    )


def gemma3() -> PreTrainedConfig:
    text = {**TEXT, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    return Gemma3Config(
        vision_config=SIGLIP, text_config=text, mm_tokens_per_image=4, image_token_index=IMAGE
    )


def gemma3_processor() -> Any:
    images: Any = Gemma3ImageProcessorPil
    build: Any = Gemma3Processor
    return build(
        image_processor=images(size={"height": 32, "width": 32}),
        tokenizer=tokenizer(),
        image_seq_length=4,
        chat_template=template("<boi>"),
    )


def paligemma() -> PreTrainedConfig:
    text = {**TEXT, "model_type": "gemma", "head_dim": 16}
    return PaliGemmaConfig(
        vision_config=SIGLIP, text_config=text, image_token_index=IMAGE, projection_dim=64
    )


def paligemma_processor() -> Any:
    images: Any = SiglipImageProcessorPil
    pictures = images(size={"height": 32, "width": 32})
    pictures.image_seq_length = 16
    build: Any = PaliGemmaProcessor
    return build(image_processor=pictures, tokenizer=tokenizer())


def qwen3_vl() -> PreTrainedConfig:
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    text = {**TEXT, "head_dim": 16, "num_hidden_layers": 3, "rope_parameters": MROPE}
    vision["deepstack_visual_indexes"] = [0, 1]
    return Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def internvl() -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8]}
    return InternVLConfig(
        vision_config={**vision, "initializer_range": 0.2},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def internvl_processor() -> Any:
    """A picture has up to four tiles, and the whole of it after them."""
    images: Any = GotOcr2ImageProcessorPil
    build: Any = images_only(InternVLProcessor)
    return build(
        image_processor=images(
            size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4
        ),
        tokenizer=tokenizer(
            context_image_token="<image>", start_image_token="<boi>", end_image_token="<eoi>"
        ),
        image_seq_length=4,
        chat_template=template("<image>"),
    )


PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 96]]


def llava_next() -> PreTrainedConfig:
    whole = tiny.tiny_config()
    return LlavaNextConfig(
        vision_config=whole.vision_config,
        text_config=whole.text_config,
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )


def llava_next_processor() -> Any:
    edge = {"height": 32, "width": 32}
    images: Any = LlavaNextImageProcessorPil
    build: Any = LlavaNextProcessor
    return build(
        image_processor=images(size=edge, crop_size=edge, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def mistral3() -> PreTrainedConfig:
    return Mistral3Config(
        vision_config=PIXTRAL,
        text_config={**TEXT, "model_type": "mistral"},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def llava_pixtral() -> PreTrainedConfig:
    return LlavaConfig(
        vision_config=PIXTRAL,
        text_config={**TEXT, "model_type": "mistral"},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def pixtral_processor(merge: int) -> Any:
    """Args:
    merge: patches of a side of a token.
    """
    images: Any = PixtralImageProcessorPil
    build: Any = loading.pixtral_processor()
    return build(
        image_processor=images(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        tokenizer=tokenizer(),
        patch_size=8,
        spatial_merge_size=merge,
        image_token="<image>",
        image_break_token="<boi>",
        image_end_token="<eoi>",
        chat_template=template("<image>"),
    )


def glm4v() -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 64, "image_size": 32}
    rope = {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    return Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VISION_START,
        video_end_token_id=VISION_END,
    )


def glm4v_processor() -> Any:
    images: Any = Glm4vImageProcessorPil
    build: Any = images_only(Glm4vProcessor)
    return build(
        image_processor=images(
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 48 * 48},
        ),
        tokenizer=tokenizer(),
        chat_template=template("<image>"),
    )


def idefics2() -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    resampler = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1}
    resampler |= {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}
    return Idefics2Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**vision, "initializer_range": 0.2},
        perceiver_config=resampler,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def idefics2_processor() -> Any:
    images: Any = Idefics2ImageProcessorPil
    build: Any = Idefics2Processor
    return build(
        image_processor=images(
            size={"shortest_edge": 28, "longest_edge": 52}, do_image_splitting=False
        ),
        tokenizer=tokenizer(image_boundary_token="<fake_token_around_image>"),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


def qwen3_vl_moe() -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0]
    text = {**TEXT, "head_dim": 16, "rope_parameters": MROPE, "moe_intermediate_size": 32}
    text |= {"num_experts": 4, "num_experts_per_tok": 3, "decoder_sparse_step": 1}
    text |= {"mlp_only_layers": []}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def qwen3_5() -> PreTrainedConfig:
    """Two blocks of linear attention, with more heads of values than of keys, and one of the other
    kind."""
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    text = {**TEXT, "head_dim": 16, "num_hidden_layers": 3, "full_attention_interval": 2}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    rope = {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    text["rope_parameters"] = {**MROPE, **rope}
    return Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_IDS)


def gemma4() -> PreTrainedConfig:
    """As E2B has it: the last of four blocks takes keys and values of the second."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 4}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision |= {"pooling_kernel_size": 2, "position_embedding_size": 64, "use_clipped_linears": True}
    vision |= {"initializer_range": 0.2, "standardize": False}
    text = {**TEXT, "vocab_size": VOCAB_SIZE + 8, "vocab_size_per_layer_input": VOCAB_SIZE + 8}
    text |= {"num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8}
    text |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32}
    text |= {"use_double_wide_mlp": True, "final_logit_softcapping": 30.0}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return Gemma4Config(
        vision_config=vision,
        text_config=text,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB_SIZE,
        boi_token_id=None,
        eoi_token_id=None,
    )


def gemma4_processor() -> Any:
    """Its tokenizer has to have tokens for audio."""
    images: Any = Gemma4ImageProcessorPil
    audio = {name: f"<{name}>" for name in ("audio_token", "boa_token", "eoa_token")}
    build: Any = images_only(Gemma4Processor)
    return build(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        video_processor=None,
        image_processor=images(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer=tokenizer(**audio),
        chat_template=template("<image>"),
    )


def lfm2_vl() -> PreTrainedConfig:
    vision = {**SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16}
    vision = {name: value for name, value in vision.items() if name != "image_size"}
    text = {**TEXT, "model_type": "lfm2", "num_hidden_layers": 3}
    text["layer_types"] = ["conv", "full_attention", "conv"]
    text["block_auto_adjust_ff_dim"] = False
    return Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_size=64,
        downsample_factor=2,
    )


class _PatchesKwargs(ImagesKwargs, total=False):
    patch_size: int
    max_num_patches: int
    return_row_col_info: bool


class _Patches(Siglip2ImageProcessorPil):  # type: ignore[misc]
    """In the place of that of LFM2-VL, which needs torchvision; it makes no tiles."""

    valid_kwargs, return_row_col_info = _PatchesKwargs, True
    tile_size, downsample_factor, encoder_patch_size, use_thumbnail = 32, 2, 8, False

    def _preprocess(self, images: list[Any], **options: Any) -> Any:
        token = self.downsample_factor * self.encoder_patch_size
        sizes = [[-(-size // token) * token for size in image.shape[-2:]] for image in images]
        images = [
            self.resize(image, SizeDict(height=height, width=width), resample=options["resample"])
            for image, (height, width) in zip(images, sizes, strict=True)
        ]
        found = super()._preprocess(images, **{**options, "do_resize": False})
        ones = [1] * len(images)
        return BatchFeature({**found, "image_rows": ones, "image_cols": ones, "image_sizes": sizes})


_Patches.__name__ = "Siglip2ImageProcessor"  # it is saved under its name


def lfm2_vl_processor() -> Any:
    images: Any = _Patches
    build: Any = Lfm2VlProcessor
    return build(
        image_processor=images(patch_size=8, max_num_patches=64),
        tokenizer=tokenizer(image_start_token="<boi>", image_end_token="<eoi>"),
        chat_template=template("<image>"),
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava": tiny.tiny_config,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "idefics3": lambda: idefics3(Idefics3Config),
    "smolvlm": lambda: idefics3(SmolVLMConfig),
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava_next": llava_next,
    "mistral3": mistral3,
    "llava_pixtral": llava_pixtral,
    "glm4v": glm4v,
    "idefics2": idefics2,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "gemma4": gemma4,
    "lfm2_vl": lfm2_vl,
}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": tiny.tiny_processor,
    "qwen2_vl": lambda: qwen_processor(Qwen2VLProcessor),
    "qwen2_5_vl": lambda: qwen_processor(Qwen2_5_VLProcessor),
    "idefics3": lambda: idefics3_processor(Idefics3Processor, Idefics3ImageProcessorPil),
    "smolvlm": lambda: idefics3_processor(SmolVLMProcessor, SmolVLMImageProcessorPil, tiles=2),
    "llava_onevision": llava_onevision_processor,
    "gemma3": gemma3_processor,
    "paligemma": paligemma_processor,
    "qwen3_vl": lambda: qwen_processor(Qwen3VLProcessor),
    "internvl": internvl_processor,
    "llava_next": llava_next_processor,
    "mistral3": lambda: pixtral_processor(2),
    "llava_pixtral": lambda: pixtral_processor(1),
    "glm4v": glm4v_processor,
    "idefics2": idefics2_processor,
    "qwen3_vl_moe": lambda: qwen_processor(Qwen3VLProcessor),
    "qwen3_5": lambda: qwen_processor(Qwen3VLProcessor),
    "gemma4": gemma4_processor,
    "lfm2_vl": lfm2_vl_processor,
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(CONFIGS[family]())
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # as Gemma 3 starts its projector
                torch.nn.init.normal_(parameter, std=0.1)
        for number in model.state_dict().values():  # those of Gemma 4 start as 1, or infinity
            if number.numel() == 1:
                number.copy_(number.clamp(-2, 2) * 0.9)
    module: torch.nn.Module = model
    module.to(dtype).eval()
    return model


def tiny_processor(family: str) -> Any:
    """The processor of `tiny_model`."""
    return PROCESSORS[family]()


Turn = tuple[str, str, list[Image.Image]]
"""Who speaks, what is said, and the pictures before it."""


def encode_conversations(processor: Any, conversations: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """What the processor returns for some conversations, padded on the left.

    PaliGemma has no chat template and takes all pictures before the text; its processor takes no
    text without them.
    """
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if processor.chat_template:
        messages = [
            [
                {
                    "role": role,
                    "content": [
                        *({"type": "image", "image": picture} for picture in pictures),
                        {"type": "text", "text": text},
                    ],
                }
                for role, text, pictures in turns
            ]
            for turns in conversations
        ]
        encoded = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        return dict(encoded)
    pictures = [[one for _, _, some in turns for one in some] for turns in conversations]
    texts = ["\n".join(text for _, text, _ in turns) for turns in conversations]
    if not any(pictures):
        return dict(processor.tokenizer(texts, **options))
    texts = ["<image>" * len(some) + text for some, text in zip(pictures, texts, strict=True)]
    return dict(processor(images=pictures, text=texts, **options))


def template(image: str) -> str:
    """A chat template with this text in the place of an image."""
    return CHAT_TEMPLATE.replace("<image>", image)


def tokenizer(**more: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of all families.

    Args:
        more: further ones, beyond the vocabulary of others, or other names of these.
    """
    words = [*SPECIAL_TOKENS, *WORDS]
    words += [f"w{number}" for number in range(VOCAB_SIZE - len(words) - len(MARKS))]
    words = list(dict.fromkeys([*words, *MARKS.values(), *more.values()]))
    numbers = {word: number for number, word in enumerate(words)}
    backend: Any = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    build: Any = PreTrainedTokenizerFast  # untyped upstream
    found: PreTrainedTokenizerFast = build(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", **MARKS, **more},
        padding_side="left",
    )
    return found
