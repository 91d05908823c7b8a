"""The language model in the words of llama.cpp: architecture, metadata, names of tensors."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from transformers import PreTrainedConfig

from gracec.backends.gguf.entries import FLOAT, Entry, Refused, mapped
from gracec.frozen import Frozen

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
    "gemma3_text": "gemma3",
}
"""Model type of the text configuration -> architecture of llama.cpp."""
PREFIX = re.compile(r"^model\.(language_model|text_model)\.")
HEAD = "lm_head.weight"
GEMMA_PERIOD = 6
"""Every sixth layer of Gemma 3 sees the whole text: llama.cpp has it in its code."""


def architecture(config: PreTrainedConfig) -> str:
    text = config.get_text_config()
    if text.model_type not in ARCHITECTURES:
        raise Refused(f"llama.cpp knows no decoder {text.model_type!r} in a model of images")
    return ARCHITECTURES[text.model_type]


def check(config: PreTrainedConfig) -> None:
    """Refuse what llama.cpp has no key for, and would compute otherwise."""
    text, name = config.get_text_config(), architecture(config)
    expected = "gelu_pytorch_tanh" if name == "gemma3" else "silu"
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    if activation != expected:
        raise Refused(f"llama.cpp computes {expected} in {name}, the decoder has {activation}")
    kinds = set(getattr(text, "layer_types", None) or ())
    if name == "gemma3":
        _check_gemma(text)
    elif "sliding_attention" in kinds:
        raise Refused(f"llama.cpp has no sliding windows in {name}")
    for rope in _ropes(text):
        if rope.get("rope_type", "default") not in ("default", "mrope", "linear", "llama3"):
            raise Refused(f"positions of type {rope['rope_type']!r} are not written")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise Refused("llama.cpp turns whole heads, the decoder a part of each")


def _check_gemma(text: Any) -> None:
    layers = text.num_hidden_layers
    pattern = [
        "full_attention" if (number + 1) % GEMMA_PERIOD == 0 else "sliding_attention"
        for number in range(layers)
    ]
    if list(text.layer_types) != pattern:
        raise Refused(f"llama.cpp sees the whole text in every {GEMMA_PERIOD}th layer of Gemma 3")
    scalar = text.hidden_size // text.num_attention_heads if layers == 62 else text.head_dim
    if text.query_pre_attn_scalar != scalar:
        raise Refused(f"llama.cpp divides by the root of {scalar} in the attention of Gemma 3")
    if text.attn_logit_softcapping:
        raise Refused("llama.cpp caps no attention of Gemma 3")


def _ropes(text: Any) -> list[dict[str, Any]]:
    """Parameters of the positions, of the whole text and then of windows."""
    found = text.rope_parameters
    if "full_attention" in found:
        return [found["full_attention"], found["sliding_attention"]]
    return [found]


def write_metadata(writer: Any, config: PreTrainedConfig) -> None:
    """Sizes, positions and norms, under the keys of llama.cpp.

    Args:
        writer: a `gguf.GGUFWriter`.
    """
    import gguf

    text, name = config.get_text_config(), architecture(config)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(text.vocab_size)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    if name == "llama":
        writer.add_rope_dimension_count(head)
    rope, *windows = _ropes(text)
    writer.add_rope_freq_base(rope["rope_theta"])
    if windows:
        writer.add_rope_freq_base_swa(windows[0]["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0, 0][:4])
    if name == "gemma3":
        writer.add_sliding_window(text.sliding_window)
        if text.final_logit_softcapping:
            writer.add_final_logit_softcapping(text.final_logit_softcapping)
    if name == "qwen3vl":
        writer.add_num_deepstack_layers(len(config.vision_config.deepstack_visual_indexes))


def entries(frozen: Frozen) -> list[Entry]:
    """Every tensor of the decoder's file."""
    import gguf

    config = frozen.config
    text, name = config.get_text_config(), architecture(config)
    arch = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    found = []
    for fqn in sorted({*frozen.weights, *frozen.others}):
        if fqn != HEAD and not PREFIX.match(fqn):
            continue
        module = fqn.split(".")[-2]
        norm = module.endswith("norm")
        turned = name == "llama" and module in heads
        found.append(
            Entry(
                mapped(names, PREFIX.sub("model.", fqn), fqn),
                fqn,
                heads=heads[module] if turned else 0,
                types=FLOAT if norm or fqn.endswith(".bias") else Entry.types,
                # What Gemma multiplies with is 1 + the weight.
                change=(lambda tensor: tensor.float() + 1) if norm and name == "gemma3" else None,
            )
        )
    rope = _ropes(text)[0]
    if rope.get("rope_type") == "llama3":
        found.append(Entry("rope_freqs.weight", "", types=FLOAT, given=_llama3_factors(text, rope)))
    return found


def _llama3_factors(text: Any, rope: dict[str, Any]) -> torch.Tensor:
    """What llama.cpp divides each frequency by."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = (rope["original_max_position_embeddings"] / lengths - low) / (high - low)
    share = share.clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - share) / rope["factor"] + share)
    return factors.float()
