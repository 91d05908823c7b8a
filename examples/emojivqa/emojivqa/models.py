"""The two vision-language models: a small student and a larger teacher, both LLaVA."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .scenes import SIZE
from .tokenizer import PATCH, VOCABULARY_SIZE, build_processor, vocabulary

SIZES = {
    "student": {"width": 128, "inner": 384, "layers": 4, "tower": 128, "tower_layers": 4},
    "teacher": {"width": 256, "inner": 512, "layers": 4, "tower": 192, "tower_layers": 4},
}
HEAD = 32


def build(name: str) -> LlavaForConditionalGeneration:
    """An untrained model of `SIZES`, float32; its word vectors have length about one."""
    size = SIZES[name]
    ids = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=size["tower"],
        intermediate_size=4 * size["tower"],
        num_hidden_layers=size["tower_layers"],
        num_attention_heads=size["tower"] // HEAD,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=size["width"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["width"] // HEAD,
        num_key_value_heads=size["width"] // HEAD,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=size["width"] ** -0.5)
    return model


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights (float16), configuration, tokenizer and processor for `from_pretrained`."""
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    build_processor().save_pretrained(folder)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, SIZE, SIZE, 3] to what the processor makes of it, float32 [B, 3, SIZE, SIZE]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
