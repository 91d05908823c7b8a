"""HQQ by torchao: half-quadratic quantization, which sees no data.

It runs in gracec's own environment, which has torchao, and imports nothing of gracec. The grid is
affine: a scale and a zero point in floating point for each group, 16 bits more than a symmetric
one. The function is the one that torchao's INT4 weights call; it is not public.
"""

from __future__ import annotations

from typing import Any

import torch
from handover import Clock, groups_of, hand_over, on_affine_grid, options
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq
from transformers import AutoModelForCausalLM


def main() -> None:
    asked = options(("hqq",))
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    original = model.state_dict()
    groups = groups_of(original, asked.group_size)
    found = {}
    clock = Clock()
    with clock.running():
        for name, group in groups.items():
            found[name] = _choose_qparams_and_quantize_affine_hqq(
                original[name],
                nbits=asked.bits,
                group_size=group,
                compute_dtype=torch.float32,
                device="cpu",
                raw_output=True,
            )
    written = {}
    for name, (codes, scale, zero, _) in found.items():
        shape = (len(original[name]), -1)
        parts = codes.float().view(shape), scale.float().view(shape), zero.float().view(shape)
        written[name] = on_affine_grid(name, *parts, asked.bits, groups[name])
    hand_over(asked, written, original, clock, ("torchao", "torch"), zero_bits=16)


if __name__ == "__main__":
    main()
