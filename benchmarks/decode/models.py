"""The two decoders, and the LLaVA around each: gracec compiles vision-language models.

The vision tower is tiny and random, and no benchmark runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZES: Mapping[str, Mapping[str, Any]] = {
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
}
"""Random models; the weights of the others are read from a file."""
IMAGE_TOKEN = 5
IMAGE_SIZE, PATCH_SIZE = 28, 14


def random_decoder(name: str) -> LlamaForCausalLM:
    """A Llama with seeded random weights.

    The embedding has a spread of 1, as that of a trained model has after its first norm, so that
    the tokens of a prompt matter and greedy answers do not repeat one token.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[name])).eval()
    model.get_input_embeddings().weight.data.normal_()
    return model


def load_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The decoder that `prepare.py` wrote."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)


def as_llava(decoder: Any) -> LlavaForConditionalGeneration:
    """A LLaVA whose language model has the tensors of a decoder."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = decoder.config
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.tie_weights()
    return model.eval()


def processor(vocabulary: int) -> LlavaProcessor:
    """A processor, which every artifact has; its words are the numbers of the tokens."""
    words = {str(number): number for number in range(vocabulary)}
    words["<image>"] = words.pop(str(IMAGE_TOKEN))
    words["<unk>"] = words.pop("0")
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
