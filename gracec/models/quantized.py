"""Checkpoints whose weights are quantized already: which of them can be read as what they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import FineGrainedFP8Config, PreTrainedConfig

from gracec.errors import GracecError

FP8 = "fp8"


def quantization_method(config: PreTrainedConfig) -> str:
    """What a configuration says its weights are quantized with, or an empty string."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    method = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    return str(getattr(method, "value", method))


def check_full_precision(config: PreTrainedConfig, where: str) -> str:
    """Refuse weights that are codes already.

    Returns:
        What a user should know, or an empty string: FP8 weights are read, as their values times
        their scales, which is exact.

    Raises:
        GracecError: naming the method.
    """
    method = quantization_method(config)
    if method == FP8:
        return "the checkpoint holds FP8 weights: their values times their scales are compiled"
    if method:
        raise GracecError(
            f"the weights are quantized already, by {method}",
            where=where,
            fix="give the full-precision model that they were made from",
        )
    return ""


def dequantizing(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that read FP8 weights as what they stand for, on any machine.

    By itself transformers does so only where no GPU is.
    """
    if quantization_method(config) != FP8:
        return {}
    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
