"""A tiny random LLaVA and its processor: the real classes, small enough for every test.

A 32 px image in patches of 8 px gives 16 visual tokens. The weights are drawn wide enough that the
logits have clear winners and that another image gives another answer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, PATCH_SIZE = 32, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
VOCAB_SIZE = 128

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL_TOKENS))
WORDS = (
    "USER ASSISTANT : ? . , ! what which where who how many is are the a an this that it in on of "
    "at to there see do does you describe image picture shape color object left right top bottom "
    "above below middle red green blue yellow black white gray circle square triangle star cross "
    "small large yes no none zero one two three four five six seven eight nine ten and or not"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<s> ' + message['role'] | upper + ' : ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{{ '</s> ' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> ASSISTANT : ' }}{% endif %}"
)

DEFAULT_PROMPTS = ("what is this ?", "where is the small red circle in the picture ?")


TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tiny_config(*, tie: bool = False, **overrides: Any) -> LlavaConfig:
    """The configuration of `tiny_llava`; see there for the overrides."""
    text = dict(TEXT)
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 32,
        "initializer_factor": 4.0,
    }
    whole: dict[str, Any] = {
        "image_token_index": IMAGE,
        "image_seq_length": IMAGE_TOKENS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    for name, value in overrides.items():
        if name in whole:
            whole[name] = value
        elif name.startswith("vision_"):
            vision[name.removeprefix("vision_")] = value
        else:
            text[name] = value
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(tie_word_embeddings=tie, **text),
        tie_word_embeddings=tie,
        **whole,
    )


def tiny_llava(
    seed: int = 0, dtype: torch.dtype = torch.float32, *, tie: bool = False, **overrides: Any
) -> LlavaForConditionalGeneration:
    """A random LLaVA in eval mode: CLIP tower, two-layer projector, two Llama layers.

    Args:
        seed: of the weights; the global random state is left as it was.
        dtype: of all parameters.
        tie: whether the head and the token embedding are one parameter.
        overrides: fields of the decoder's configuration, e.g. `num_hidden_layers=3`; with the
            prefix `vision_` of the tower's, e.g. `vision_hidden_size=64`; or of LlavaConfig itself.
    """
    config = tiny_config(tie=tie, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    module: torch.nn.Module = model  # whose `to` and `eval` are typed
    module.to(dtype).eval()
    return model


@cache
def _tokenizer_json() -> str:
    words = [*SPECIAL_TOKENS, *WORDS]
    words += [f"w{number}" for number in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over WORDS and fillers; everything else is <unk>."""
    build: Any = PreTrainedTokenizerFast  # untyped upstream
    tokenizer: PreTrainedTokenizerFast = build(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    return tokenizer


def tiny_processor(*, chat_template: str | None = CHAT_TEMPLATE) -> LlavaProcessor:
    """The processor of `tiny_llava`: left padding, 32 px images, 16 placeholders per image."""
    edge = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    build: Any = LlavaProcessor  # untyped upstream
    processor: LlavaProcessor = build(
        image_processor=CLIPImageProcessorPil(size=edge, crop_size=edge, do_center_crop=False),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    return processor


def tiny_image(seed: int = 0, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """A random RGB image of four flat quarters, so that resizing keeps what it shows."""
    quarters = np.random.default_rng(seed).integers(0, 256, size=(2, 2, 3), dtype=np.uint8)
    return Image.fromarray(quarters).resize(size, Image.Resampling.NEAREST)


def tiny_batch(
    model_or_processor: LlavaForConditionalGeneration | LlavaProcessor | None = None,
    prompts: tuple[str, ...] = DEFAULT_PROMPTS,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A left-padded batch, one image a prompt: input_ids, attention_mask, pixel_values.

    Given a model, the batch is on its device and the pixels have its dtype.
    """
    model: Any = None if isinstance(model_or_processor, LlavaProcessor) else model_or_processor
    processor: Any = tiny_processor() if model_or_processor is model else model_or_processor
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    images = [tiny_image(seed + number) for number in range(len(prompts))]
    encoded = processor(
        text=texts,
        images=images,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    batch: dict[str, Tensor] = {
        name: encoded[name] for name in ("input_ids", "attention_mask", "pixel_values")
    }
    if model is not None:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch
