"""Hugging Face models: loading them, looking at them without weights, changing one's own."""

from gracec.models.loading import load_config, load_model, load_processor

__all__ = ["load_config", "load_model", "load_processor"]
