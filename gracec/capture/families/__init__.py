"""One small adapter per model family: what happens on the host, and what is traced.

Adding a family means adding one file here that defines one `Family` subclass. Another package
declares its own by an entry point of the group `gracec.capture.families`, and in a script it is
enough to define one. A model whose family has none is captured by the generic one, if it can be.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from gracec.capture.families.base import Family
from gracec.capture.families.generic import Generic
from gracec.errors import GracecError
from gracec.registry import Registry

__all__ = ["FAMILIES", "GENERIC", "Family", "Generic", "families", "family_for", "family_of"]

FAMILIES: Registry[Family] = Registry(
    "family",
    Family,  # type: ignore[type-abstract]
    "gracec.capture.families",
    attribute="model_type",
)
"""Model type of the Hugging Face config -> the class of the adapter for it."""

GENERIC = Generic()
"""The adapter for models of families that have none."""


def families() -> dict[str, Family]:
    """Model type of the Hugging Face config -> the adapter for it, the same one each time.

    Raises:
        GracecError: if two are for one model type, or a declared one cannot be imported.
    """
    return {model_type: cls.instance() for model_type, cls in FAMILIES.all().items()}


def family_of(model: PreTrainedModel) -> Family:
    """The adapter for a model.

    Raises:
        GracecError: if the model is not a vision-language model.
    """
    config = model.config
    where = type(model).__name__
    if getattr(config, "vision_config", None) is None or not model.can_generate():
        raise GracecError(
            f"model type {config.model_type!r} is not a generating vision-language model",
            where=where,
            fix="pass a ...ForConditionalGeneration model with a vision_config",
        )
    return family_for(config)


def family_for(config: PreTrainedConfig) -> Family:
    """The adapter for models of a configuration, which is that of a vision-language model."""
    return families().get(config.model_type, GENERIC).of(config)
