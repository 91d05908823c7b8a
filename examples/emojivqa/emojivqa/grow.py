"""Start a wider decoder where a narrower one is: the same answers from more parameters.

Every hidden feature, attention head and some hidden units of the MLPs occur twice. What read a
feature once reads both copies, each with a random part of the weight, so the copies get different
gradients and part ways in training. The residual stream is scaled to keep its length, and with it
the length of the word vectors that the image side is aligned to.
"""

import torch
from torch import Tensor, nn


def widen_decoder(narrow: nn.Module, wide: nn.Module) -> None:
    """Give `wide` the decoder of `narrow`: equal logits for equal words and widened images.

    Both are LLaVA models with as many decoder layers and heads of the same size.
    """
    old, new = narrow.model.language_model, wide.model.language_model
    width = wide.config.text_config.hidden_size
    shrink = (width / narrow.config.text_config.hidden_size) ** -0.5
    with torch.no_grad():
        new.embed_tokens.weight.copy_(shrink * _repeat(old.embed_tokens.weight, 1, width))
        new.norm.weight.copy_(shrink * _repeat(old.norm.weight, 0, width))
        for source, target in zip(old.layers, new.layers, strict=True):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                weight = source.get_submodule(norm).weight
                target.get_submodule(norm).weight.copy_(_repeat(weight, 0, width))
            for name, linear in target.named_modules():
                if isinstance(linear, nn.Linear):
                    scale = shrink if name.endswith(("o_proj", "down_proj")) else 1.0
                    weight = source.get_submodule(name).weight
                    linear.weight.copy_(scale * _widen(weight, *linear.weight.shape))


def widen_visual(visual: Tensor, width: int) -> Tensor:
    """Visual tokens [B, V, D] as the widened decoder expects them, [B, V, width]."""
    return (width / visual.shape[-1]) ** -0.5 * _repeat(visual, 2, width)


def _repeat(weight: Tensor, dim: int, size: int) -> Tensor:
    """The entries of dimension `dim` again from the first one, until there are `size`."""
    return weight.index_select(dim, torch.arange(size) % weight.shape[dim])


def _widen(weight: Tensor, rows: int, columns: int) -> Tensor:
    """[r, c] to [rows, columns]: outputs repeat, inputs share their weight with their copies."""
    old = weight.shape[1]
    source = torch.arange(columns) % old
    copies = source.bincount(minlength=old)
    tall = _repeat(weight, 0, rows)
    noise = torch.randn(rows, columns) * weight.std() / 2
    noise -= (torch.zeros_like(tall).index_add(1, source, noise) / copies)[:, source]
    return (tall / copies)[:, source] + noise
