"""One small adapter per model family: what happens on the host, and what is traced.

Adding a family means adding one file here that defines one `Family` subclass. A model whose family
has none is captured by the generic one, if it can be.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from transformers import PreTrainedModel

from gracec.capture.families.base import Family
from gracec.capture.families.generic import Generic
from gracec.errors import GracecError

__all__ = ["GENERIC", "Family", "Generic", "families", "family_of"]

GENERIC = Generic()
"""The adapter for models of families that have none."""


@cache
def families() -> dict[str, Family]:
    """Model type of the Hugging Face config -> the adapter for it."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            adapters = importlib.import_module(f"{__name__}.{module.name}")
            for value in vars(adapters).values():
                if isinstance(value, type) and issubclass(value, Family):
                    model_type = getattr(value, "model_type", "")
                    if model_type:
                        found[model_type] = value()
    return found


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
    return families().get(config.model_type, GENERIC)
