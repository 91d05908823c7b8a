"""A LLaVA of 1.4 billion random weights: compiled through every gate, and how fast it decodes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from machine import Machine, gib
from measure import random_llava
from sections import Figures, Item
from torch import Tensor

import gracec
from gracec.capture import family_of
from gracec.kernels.torchao import PackedWeight
from gracec.passes.lower_torchao import lowered_weights

CACHES: Mapping[str, Mapping[str, str]] = {
    "eager": {},
    "static cache": {"cache_implementation": "static"},
}
"""How it decodes -> what `generate` is told; where the cache is static, transformers compiles a
step on a GPU and has it run as one CUDA graph."""


def llava(machine: Machine) -> Any:
    """A decoder of the shape of TinyLlama, 1.1 billion weights, behind a CLIP ViT-L/14 at 336."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
    }
    text = {
        "vocab_size": 32064,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }
    if machine.small:
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 2, "image_size": 56}
        text |= {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with machine.device:
        return random_llava(vision, text, torch.bfloat16)


def prompt(machine: Machine, model: Any, batch: int, text: int = 64) -> dict[str, Tensor]:
    """What a model takes: prompts with a picture each."""
    family = family_of(model)
    made = family.example_batch(model, batch=batch, images=batch, text=9 if machine.small else text)
    return {name: tensor.to(machine.device) for name, tensor in made.items()}


class Stages:
    """A callback that keeps how long each stage took, and its peak of memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.found: dict[str, dict[str, Any]] = {}
        self._name, self._start = "", 0.0

    def on_stage(self, name: str) -> None:
        self.end()
        self.machine.forget()
        self._name, self._start = name, time.perf_counter()

    def end(self) -> None:
        self.machine.wait()
        if self._name:
            seconds = round(time.perf_counter() - self._start, 2)
            self.found[self._name] = {"seconds": seconds, **self.machine.memory()}
        self._name = ""


class Serving:
    """A model in bfloat16 and what it is compiled to."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.models: dict[str, Any] = {}

    def items(self) -> list[Item]:
        found: list[Item] = [("gates", self.compile)]
        for batch in (1,) if self.machine.small else (1, 8):
            for cache in CACHES:
                found += [
                    (f"decode {name}, batch {batch}, {cache}", partial(self.decode, *which))
                    for name in ("bf16", "int4")
                    for which in [(name, batch, cache)]
                ]
        return found

    def compile(self) -> Figures:
        """Post-training quantization without data; the gates raise if anything is wrong."""
        machine, stages = self.machine, Stages(self.machine)
        model = self.models["bf16"] = llava(machine)
        options: dict[str, Any] = {"formats": (), "progress": False, "callbacks": [stages]}
        compiled = self.models["int4"] = gracec.compile(model, "w4a16-ptq", **options)
        stages.end()
        report = compiled.report
        packed = lowered_weights(compiled.program)
        codes = sum(_bytes(weight) for weight in packed.values())
        before = sum(2 * weight.numel() for weight in packed.values())
        whole = sum(2 * parameter.numel() for parameter in model.parameters())
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "gates": {name: str(figure) for name, figure in report.gates.items()},
            "stages": stages.found,
            "linears_bf16_gib": gib(before),
            "linears_int4_gib": gib(codes),
            "linears_saved_percent": round(100 * (1 - codes / before), 1),
            "model_bf16_gib": gib(whole),
            "model_int4_gib": gib(whole - before + codes),
            "model_saved_percent": round(100 * (before - codes) / whole, 1),
        }

    def decode(self, name: str, batch: int, cache: str) -> Figures:
        """Tokens a second behind the prompt: of a long answer and a short one the difference."""
        machine, model, new = self.machine, self.models[name], 12 if self.machine.small else 68
        inputs = prompt(machine, self.models["bf16"], batch)
        inputs |= family_of(self.models["bf16"]).model_inputs(self.models["bf16"], inputs)
        whole = model.model if name == "int4" else model
        torch._dynamo.reset()
        vars(whole).pop("_compiled_call", None)

        def answer(tokens: int) -> None:
            settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
            with torch.no_grad():
                model.generate(**inputs, **settings, **CACHES[cache])

        warm = machine.seconds(lambda: [answer(tokens) for tokens in (new, 4)])
        machine.forget()
        long, short = (
            min(machine.seconds(partial(answer, tokens)) for _ in range(2)) for tokens in (new, 4)
        )
        return {
            "prompt": list(inputs["input_ids"].shape),
            "tokens_per_second": round(batch * (new - 4) / max(long - short, 1e-9), 1),
            "first_4_tokens_ms": round(1e3 * short, 1),
            "warm_up_seconds": round(warm, 1),
            "compiled_by_transformers": "_compiled_call" in vars(whole),
            **machine.memory(),
        }


def _bytes(weight: PackedWeight) -> int:
    """Of a packed weight, with what it is padded by."""
    names, _ = weight.__tensor_flatten__()
    tensors = [getattr(weight, name) for name in names]
    return sum(one.numel() * one.element_size() for one in tensors)
