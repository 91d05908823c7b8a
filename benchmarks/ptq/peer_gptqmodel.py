"""GPTQ by GPTQModel.

The environment is that of gptqmodel_requirements.txt. Symmetric; all else is the peer's default: a
dampening of .05 that rises by itself, and columns by their activations within what groups allow.
What it packs is unpacked here: codes less the zero point of all groups, times scales in float16.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes 1 and refuses that

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from handover import Clock, calibration, groups_of, hand_over, on_affine_grid, options
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

META = ("act_group_aware", "damp_percent", "damp_auto_increment", "mse", "static_groups")


def unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Codes in int32 words along a dimension, lowest bits first; of 3 bits, 32 in three words."""
    words = packed.movedim(dim, -1).long() & 0xFFFFFFFF
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits)
        codes = (words[..., None] >> shifts) & (2**bits - 1)
    else:
        triples = words.unflatten(-1, (-1, 3))
        stream = (triples[..., None] >> torch.arange(32)) & 1
        digits = stream.flatten(-2).unflatten(-1, (-1, bits))
        codes = (digits << torch.arange(bits)).sum(dim=-1)
    return codes.flatten(-2).movedim(-1, dim)


def main() -> None:
    asked = options(("gptq",))
    torch.manual_seed(0)
    reference: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    original = reference.state_dict()
    groups = groups_of(original, asked.group_size)
    rules = {
        rf"+:^{name.removesuffix('.weight')}$": {"group_size": group}
        for name, group in groups.items()
        if group != asked.group_size
    }
    config = QuantizeConfig(
        bits=asked.bits, group_size=asked.group_size, sym=True, dynamic=rules or None
    )
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        for row in calibration(asked)
    ]
    clock = Clock()
    with clock.running():
        tool = GPTQModel.load(str(asked.model), config, dtype=torch.float32, device="cpu")
        tool.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        tool.save(folder)
        saved: dict[str, Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            saved |= load_file(path)
        found = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    checkpoint = found["quantization_config"].get("checkpoint_format", "gptq")
    written = {}
    for name, group in groups.items():
        module = name.removesuffix(".weight")
        codes = unpacked(saved[f"{module}.qweight"], asked.bits, 0).t()
        zeros = unpacked(saved[f"{module}.qzeros"], asked.bits, 1).t()
        if checkpoint == "gptq":
            zeros = (zeros + 1) % 2**asked.bits  # the first format keeps the zero points less one
        scale = saved[f"{module}.scales"].t().contiguous()
        order = saved[f"{module}.g_idx"].long()
        if not torch.equal(order, torch.arange(codes.shape[1]) // group):
            raise SystemExit(f"{module}: its groups are not of neighbours")
        if (zeros != 2 ** (asked.bits - 1)).any():
            raise SystemExit(f"{module}: a symmetric scheme with zero points {zeros.unique()}")
        written[name] = on_affine_grid(name, codes.float(), scale, zeros, asked.bits, group)
    worst = max(float((written[n] - original[n]).norm() / original[n].norm()) for n in groups)
    if worst > 0.5:
        raise SystemExit(f"a weight is off by {worst:.2f} of its norm: it was unpacked wrongly")
    left_out = ("dynamic", "meta")  # the groups of each linear; paths and what it told itself
    resolved = {k: v for k, v in found["quantization_config"].items() if k not in left_out}
    resolved |= {k: found["quantization_config"]["meta"].get(k) for k in META}
    packages = ("gptqmodel", "torch", "transformers")
    hand_over(asked, written, original, clock, packages, options=resolved)


if __name__ == "__main__":
    main()
