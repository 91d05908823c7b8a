"""The tower and the projector in the words of llama.cpp: what it loads as `mmproj`.

One function for each family writes its metadata, and one says which tensors there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from gracec.backends.gguf.entries import (
    FILTERS,
    FLOAT,
    Entry,
    Refused,
    block_number,
    mapped,
    split_rows,
    without_prefix,
)
from gracec.frozen import Frozen

PATCHES = "v.patch_embd.weight"
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")


class Projector(NamedTuple):
    """How a family is written.

    Attributes:
        type: what llama.cpp calls its projector.
        check: raises `Refused` for a configuration that llama.cpp cannot compute.
        metadata: further keys, after those that all towers have.
        entries: the tensors.
        size: side of a picture in pixels.
    """

    type: str
    check: Callable[[PreTrainedConfig], None]
    metadata: Callable[[Any, PreTrainedConfig, Any], None]
    entries: Callable[[Frozen, Any], Iterator[Entry]]
    size: Callable[[Any], int]


def projector_of(config: PreTrainedConfig) -> Projector:
    if config.model_type not in PROJECTORS:
        known = ", ".join(sorted(PROJECTORS))
        raise Refused(f"GGUF is written for {known}, this is {config.model_type!r}")
    return PROJECTORS[config.model_type]


def layers_of(config: PreTrainedConfig) -> int:
    """Blocks of the tower that are stored: LLaVA may take its features before the last one."""
    vision = config.vision_config
    total: int = getattr(vision, "num_hidden_layers", None) or vision.depth
    if config.model_type == "llava":
        layer: int = config.vision_feature_layer
        return layer if layer >= 0 else total + 1 + layer
    return total


def write_metadata(writer: Any, config: PreTrainedConfig, images: Any) -> None:
    """Everything that llama.cpp asks for.

    Args:
        writer: a `gguf.GGUFWriter`.
        images: the image processor.
    """
    import gguf

    family, vision = projector_of(config), config.vision_config
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(family.type)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_vision_image_size(family.size(vision))
    writer.add_vision_patch_size(vision.patch_size)
    width, inner = vision.hidden_size, getattr(vision, "intermediate_size", None)
    if config.model_type == "qwen2_vl":  # whose hidden size is that of the decoder
        width, inner = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(inner)
    writer.add_vision_block_count(layers_of(config))
    writer.add_vision_head_count(getattr(vision, "num_attention_heads", None) or vision.num_heads)
    writer.add_vision_image_mean(list(images.image_mean))
    writer.add_vision_image_std(list(images.image_std))
    if vision.hidden_act in GELU:
        writer.add_vision_use_gelu(True)
    elif vision.hidden_act == "silu":
        writer.add_vision_use_silu(True)
    family.metadata(writer, config, images)


def entries(frozen: Frozen) -> list[Entry]:
    """Every tensor of the file."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers_of(frozen.config))
    found = []
    for entry in projector_of(frozen.config).entries(frozen, names):
        vector = frozen.skeleton.get_parameter(entry.fqn).dim() < 2
        if vector or entry.name.startswith("v.position_embd"):
            entry = replace(entry, types=FLOAT)
        elif entry.name.startswith(PATCHES):
            entry = replace(entry, types=FILTERS)
        found.append(entry)
    return found


def _check_activation(config: PreTrainedConfig, *allowed: str) -> None:
    found = config.vision_config.hidden_act
    if found not in allowed:
        raise Refused(f"llama.cpp does not compute {found} in a tower of {config.model_type}")


def _square(vision: Any) -> int:
    size: int = vision.image_size
    return size


# LLaVA 1.5: CLIP or SigLIP, and two linears.


def _check_llava(config: PreTrainedConfig) -> None:
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise Refused(f"llama.cpp knows no LLaVA with a tower {vision.model_type!r}")
    _check_activation(config, *GELU, "quick_gelu", "silu")
    if not isinstance(config.vision_feature_layer, int) or layers_of(config) < 1:
        raise Refused(f"features of layers {config.vision_feature_layer} are not written")
    clip = vision.model_type == "clip_vision_model"
    strategy = "default" if clip else "full"
    if config.vision_feature_select_strategy != strategy:
        raise Refused(f"llama.cpp takes features of this tower as {strategy!r} does")
    if config.projector_hidden_act not in GELU or not config.multimodal_projector_bias:
        raise Refused("llama.cpp has a projector of LLaVA with biases and GELU alone")


def _llava_metadata(writer: Any, config: PreTrainedConfig, images: Any) -> None:
    writer.add_vision_attention_layernorm_eps(config.vision_config.layer_norm_eps)
    # Said even where it is the last: llama.cpp leaves one more out by itself.
    writer.add_array("clip.vision.feature_layer", [layers_of(config)])


LLAVA_LINEARS = {"linear_1": "mm.0", "linear_2": "mm.2"}


def _llava_entries(frozen: Frozen, names: Any) -> Iterator[Entry]:
    kept = layers_of(frozen.config)
    everything = (*frozen.weights, *frozen.others)
    tower = without_prefix(dict.fromkeys(everything), "model.vision_tower.")
    for fqn, rest in tower.items():
        number = block_number(rest)
        # Features are taken before the last norm, and SigLIP's head makes none.
        unused = rest.startswith(("post_layernorm.", "head."))
        if unused or (number is not None and number >= kept):
            continue
        yield Entry(mapped(names, f"vision_tower.vision_model.{rest}", fqn), fqn)
    projector = without_prefix(dict.fromkeys(everything), "model.multi_modal_projector.")
    for fqn, rest in projector.items():
        linear, _, suffix = rest.partition(".")
        yield Entry(f"{LLAVA_LINEARS[linear]}.{suffix}", fqn)


# Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of two frames, one matrix for queries, keys, values.

FULL_WINDOW = 112
"""Pixels of a window of Qwen2.5-VL, which llama.cpp has in its code."""


def _check_qwen(config: PreTrainedConfig) -> None:
    vision = config.vision_config
    expected = {"qwen2_vl": ("quick_gelu",), "qwen2_5_vl": ("silu",), "qwen3_vl": GELU}
    _check_activation(config, *expected[config.model_type])
    if vision.temporal_patch_size != 2 or vision.in_channels != 3:
        raise Refused("llama.cpp takes patches of two frames in three colours")
    if config.model_type == "qwen2_5_vl":
        if vision.window_size != FULL_WINDOW:
            raise Refused(f"llama.cpp has windows of {FULL_WINDOW} px, not {vision.window_size}")
        _window_period(vision)


def _window_period(vision: Any) -> int:
    """Every how many blocks the tower of Qwen2.5-VL sees the whole picture."""
    whole: list[int] = list(vision.fullatt_block_indexes)
    period = whole[0] + 1 if whole else 0
    if not whole or whole != list(range(whole[0], vision.depth, period)):
        raise Refused(f"llama.cpp sees the whole picture in every n-th block, not in {whole}")
    return period


def _qwen_metadata(writer: Any, config: PreTrainedConfig, images: Any) -> None:
    vision = config.vision_config
    writer.add_vision_attention_layernorm_eps(1e-6)  # not configured: the classes have it so
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    if config.model_type == "qwen2_5_vl":
        writer.add_vision_n_wa_pattern(_window_period(vision))
    if config.model_type == "qwen3_vl":
        deep = vision.deepstack_visual_indexes
        writer.add_vision_is_deepstack_layers([number in deep for number in range(vision.depth)])


def _qwen_size(vision: Any) -> int:
    """Any: pictures keep their own size. That of the learned positions, where there are some."""
    learned = getattr(vision, "num_position_embeddings", None)
    return int(learned**0.5) * vision.patch_size if learned else 560


QWEN_MERGER = {
    "ln_q": "v.post_ln",
    "norm": "v.post_ln",
    "mlp.0": "mm.0",
    "mlp.2": "mm.2",
    "linear_fc1": "mm.0",
    "linear_fc2": "mm.2",
}
QWEN_DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def _qwen_entries(frozen: Frozen, names: Any) -> Iterator[Entry]:
    deep = getattr(frozen.config.vision_config, "deepstack_visual_indexes", ())
    everything = dict.fromkeys((*frozen.weights, *frozen.others))
    for fqn, rest in without_prefix(everything, "model.visual.").items():
        module, _, suffix = rest.rpartition(".")
        if rest == "patch_embed.proj.weight":
            for frame, name in enumerate((PATCHES, f"{PATCHES}.1")):
                yield Entry(name, fqn, change=_frame(frame))
        elif module.startswith("merger."):
            yield Entry(f"{QWEN_MERGER[module.removeprefix('merger.')]}.{suffix}", fqn)
        elif module.startswith("deepstack_merger_list."):
            _, number, layer = module.split(".")
            place = f"v.deepstack.{deep[int(number)]}.{QWEN_DEEPSTACK[layer]}.{suffix}"
            yield Entry(place, fqn)
        else:
            entry = Entry(mapped(names, f"visual.{rest}", fqn), fqn)
            if ".attn_qkv." not in entry.name or frozen.config.model_type == "qwen3_vl":
                yield entry
            else:
                yield from split_rows(entry, "attn_qkv", ("attn_q", "attn_k", "attn_v"))


def _frame(number: int) -> Callable[[Tensor], Tensor]:
    return lambda filters: filters[:, :, number]


# Gemma 3: SigLIP, an average of patches, a norm and a matrix.


def _check_gemma3(config: PreTrainedConfig) -> None:
    _check_activation(config, *GELU)
    if _gemma3_pooling(config) not in (2, 4):
        raise Refused("llama.cpp averages 2 or 4 patches along a side")


def _gemma3_pooling(config: PreTrainedConfig) -> int:
    vision = config.vision_config
    tokens: int = config.mm_tokens_per_image
    patches: int = vision.image_size // vision.patch_size
    return int(patches // tokens**0.5)


def _gemma3_metadata(writer: Any, config: PreTrainedConfig, images: Any) -> None:
    writer.add_vision_attention_layernorm_eps(config.vision_config.layer_norm_eps)
    if (pooled := _gemma3_pooling(config)) != 4:
        writer.add_vision_projector_scale_factor(pooled)


def _gemma3_entries(frozen: Frozen, names: Any) -> Iterator[Entry]:
    everything = dict.fromkeys((*frozen.weights, *frozen.others))
    for fqn, rest in without_prefix(everything, "model.vision_tower.").items():
        if not rest.startswith("head."):
            yield Entry(mapped(names, f"vision_tower.vision_model.{rest}", fqn), fqn)
    projector = "model.multi_modal_projector."
    yield Entry(
        "mm.input_projection.weight", f"{projector}mm_input_projection_weight", types=FILTERS
    )
    yield Entry(
        "mm.soft_emb_norm.weight",
        f"{projector}mm_soft_emb_norm.weight",
        change=lambda norm: norm.float() + 1,
    )


# Idefics 3 and SmolVLM: SigLIP, a pixel shuffle and a matrix.


def _check_idefics3(config: PreTrainedConfig) -> None:
    _check_activation(config, *GELU)


def _idefics3_metadata(writer: Any, config: PreTrainedConfig, images: Any) -> None:
    writer.add_vision_attention_layernorm_eps(config.vision_config.layer_norm_eps)
    writer.add_vision_projector_scale_factor(config.scale_factor)
    longest = dict(images.size).get("longest_edge", config.vision_config.image_size)
    writer.add_vision_preproc_image_size(longest)


def _idefics3_entries(frozen: Frozen, names: Any) -> Iterator[Entry]:
    everything = dict.fromkeys((*frozen.weights, *frozen.others))
    tower = without_prefix(everything, "model.vision_model.", "model.connector.")
    for fqn in tower:
        yield Entry(mapped(names, fqn, fqn), fqn)


_QWEN = (_check_qwen, _qwen_metadata, _qwen_entries, _qwen_size)
_IDEFICS3 = (_check_idefics3, _idefics3_metadata, _idefics3_entries, _square)
PROJECTORS = {
    "llava": Projector("mlp", _check_llava, _llava_metadata, _llava_entries, _square),
    "qwen2_vl": Projector("qwen2vl_merger", *_QWEN),
    "qwen2_5_vl": Projector("qwen2.5vl_merger", *_QWEN),
    "qwen3_vl": Projector("qwen3vl_merger", *_QWEN),
    "gemma3": Projector("gemma3", _check_gemma3, _gemma3_metadata, _gemma3_entries, _square),
    "idefics3": Projector("idefics3", *_IDEFICS3),
    "smolvlm": Projector("idefics3", *_IDEFICS3),
}
