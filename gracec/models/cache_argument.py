"""What the cache of a decoder is called where models take and return it."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

RENAMED = any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
CACHE_ARGUMENT = "cache" if RENAMED else "past_key_values"
"""`cache` from transformers 5.24 on, which still understands what it was called before."""
