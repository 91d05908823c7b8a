"""How much memory a model takes, before any of it is loaded.

The model of `compile` counts what is alive at each stage of `gracec.compiler` and the temporaries
of one layer. With P parameters of e bytes each, of which Q are quantized in groups with G scales,
and d bytes for each one that is not when deployed:

    load     e P                                     the mapped file; and what it is widened to
    prepare  e P + Q / 2 + 8 G + some of a layer     scale search, freezing, the gate between both
    lower    d (P - Q) + Q / 2 + Q / 2 + ...         codes, packed codes, both kinds of scales
    verify   the same + 12 bytes of a layer          INT4 compared with dense weights and float64
             or + logits in float64
    save     the same + the codes as they are written

The file of a checkpoint stays mapped as a whole until its last tensor is copied, when it is
lowered. A model that is given as an object keeps its e P to the end, unless `inplace=True` lets
every weight give back its memory as it is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.passes.plan_quantization import Plan, PlanEntry

LOGIT_COPIES = 7
"""Float64 tensors [positions, V] that are alive at once where two sets of logits are compared."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, all of them.

    Attributes:
        weights: of all weights, by precision: stored, float32, bfloat16, compiled.
        libraries: of this process before any weight is read.
        stages: stage of `compile` -> bytes alive at its highest point, without `libraries`.
        copy: what a model object keeps to the end on top, unless `inplace=True`.
        batch, tokens: of the shapes below; `tokens` a prompt, those of its images included.
        kv_cache_per_token: keys and values of one token in every block, as deployed.
        logits: of [batch, tokens, vocabulary], by dtype.
    """

    weights: Mapping[str, int]
    libraries: int
    stages: Mapping[str, int]
    copy: int
    batch: int
    tokens: int
    kv_cache_per_token: int
    logits: Mapping[str, int]

    @property
    def compile_peak(self) -> int:
        """Resident bytes of a process that compiles the model from its directory."""
        return self.libraries + max(self.stages.values())

    @property
    def kv_cache(self) -> int:
        """Bytes of keys and values of the whole batch."""
        return self.kv_cache_per_token * self.batch * self.tokens

    def lines(self) -> list[str]:
        """For people."""
        weights = ", ".join(f"{name} {size(count)}" for name, count in self.weights.items())
        stage = max(self.stages, key=lambda name: self.stages[name])
        stages = ", ".join(f"{name} {size(count)}" for name, count in self.stages.items())
        shape = f"batch {self.batch}, {self.tokens} tokens"
        logits = ", ".join(f"{name} {size(count)}" for name, count in self.logits.items())
        return [
            f"weights     {weights}",
            f"compiling   {size(self.compile_peak)} at the highest point ({stage}), of which "
            f"libraries {size(self.libraries)}",
            f"            by stage: {stages}",
            f"            up to {size(self.copy)} more for a model object without inplace=True",
            f"KV cache    {size(self.kv_cache_per_token)} a token, {size(self.kv_cache)} ({shape})",
            f"logits      {logits} ({shape})",
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "weights": dict(self.weights),
            "libraries": self.libraries,
            "compile_stages": dict(self.stages),
            "compile_peak": self.compile_peak,
            "compile_copy": self.copy,
            "batch": self.batch,
            "tokens": self.tokens,
            "kv_cache_per_token": self.kv_cache_per_token,
            "kv_cache": self.kv_cache,
            "logits": dict(self.logits),
        }


def memory_plan(
    model: PreTrainedModel,
    plan: Plan,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    tokens: int = 128,
    stored: torch.dtype | None = None,
) -> MemoryPlan:
    """The plan of a model, whose parameters may be stand-ins.

    Args:
        plan: what is quantized.
        dtype: of the compiled model.
        batch, tokens: prompts, and tokens a prompt, those of its images included.
        stored: dtype in the checkpoint, where that is not the one in memory.
    """
    quantized = [entry for entry in plan.entries if entry.spec is not None]
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    loaded = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    file = loaded if stored in (None, model.dtype) else total * stored.itemsize
    deployed = dtype.itemsize
    codes = sum(entry.numel for entry in quantized)
    scales = sum(_scales(entry) for entry in quantized)
    packed = sum(_packed(entry) for entry in quantized)
    element = loaded // total
    others = (total - codes) * deployed
    compiled = (total - codes) * 2 + packed + 2 * scales

    frozen = packed + 4 * scales  # codes as they are stored, float32 scales
    lowered = others + frozen + packed + 2 * deployed * scales  # a scale and a zero each
    positions, chosen = _gate_positions(model)
    vocabulary = model.config.get_text_config().vocab_size
    logits = positions * vocabulary * element
    compared = 2 * logits + chosen * vocabulary * 8 * LOGIT_COPIES
    stages = {
        "load": loaded if file == loaded else loaded + file,
        "prepare": loaded + frozen + 4 * scales + max(2 * logits, _largest(quantized, 8)),
        "lower": lowered + max((_unpacking(entry, deployed) for entry in quantized), default=0),
        "verify": lowered + max(_largest(quantized, 12 + deployed), compared),
        "save": lowered + packed + 2 * scales,
    }
    config = model.config.get_text_config()
    logit_count = batch * tokens * vocabulary
    return MemoryPlan(
        weights={
            "stored": file,
            "float32": 4 * total,
            "bfloat16": 2 * total,
            "compiled": compiled,
        },
        libraries=_resident(),
        stages=stages,
        copy=loaded,
        batch=batch,
        tokens=tokens,
        kv_cache_per_token=_kv_elements(config) * deployed,
        logits={"bfloat16": 2 * logit_count, "float32": 4 * logit_count},
    )


def size(count: int) -> str:
    """ "1.23 GB": bytes in decimal units, three digits."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _scales(entry: PlanEntry) -> int:
    assert entry.spec is not None
    rows, groups = entry.spec.scale_shape(*entry.shape)
    return rows * groups


def _packed(entry: PlanEntry) -> int:
    assert entry.spec is not None
    return entry.numel * entry.spec.storage_bits // 8


def _largest(quantized: list[PlanEntry], per_element: int) -> int:
    return max((entry.numel for entry in quantized), default=0) * per_element


def _unpacking(entry: PlanEntry, deployed: int) -> int:
    """Codes as int8 and int32, then the activations that read a packed weight back."""
    columns, experts = entry.shape[-1], entry.experts.count if entry.experts else 1
    return max(5 * entry.numel // experts, columns * columns // 16 * deployed)


def _gate_positions(model: PreTrainedModel) -> tuple[int, int]:
    """Positions of the batch that the gates run, with and without padding."""
    mask = family_of(model).example_batch(model)["attention_mask"]
    return mask.numel(), int(mask.sum())


def _kv_elements(config: Any) -> int:
    """Keys and values of one token in every block of the decoder."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width)


def _resident() -> int:
    """Bytes that this process holds in memory now, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return 0
    import resource

    return pages * resource.getpagesize()
