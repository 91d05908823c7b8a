"""AutoRound by Intel: rounding trained block by block with signed gradients, or plain.

The environment is that of benchmarks/evidence/peer_requirements.txt, which llm-compressor brings it
to. Symmetric; a scale may be negative, so that the larger side has one level more. Its default is
200 iterations a block; "lightN" is N of them with the learning rate of its light recipe, 5e-3. It
computes in bfloat16; its codes and scales are taken, and their product is in float32 here.
"""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from cells import AUTOROUND_ITERATIONS
from handover import Clock, calibration, groups_of, hand_over, on_grid, options
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

LIGHT = f"light{AUTOROUND_ITERATIONS}"


def main() -> None:
    asked = options(("rtn", LIGHT))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = groups_of(original, asked.group_size)
    given: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True}
    if asked.method == LIGHT:
        ids = calibration(asked)
        batches = [{"input_ids": r[None], "attention_mask": torch.ones_like(r[None])} for r in ids]
        given = {
            "iters": AUTOROUND_ITERATIONS,
            "lr": 5e-3,
            "dataset": DataLoader(batches, batch_size=None),
            "nsamples": len(ids),
            "seqlen": ids.shape[1],
            "batch_size": 8,
        }
    each = {
        name.removesuffix(".weight"): {"bits": asked.bits, "group_size": group}
        for name, group in groups.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tool = AutoRound(
        model,
        tokenizer,
        bits=asked.bits,
        group_size=asked.group_size,
        sym=True,
        layer_config=each,
        device_map="cpu",
        scale_dtype="fp32",
        seed=0,
        **given,
    )
    clock = Clock()
    with clock.running():
        model, _ = tool.quantize()
    modules = dict(model.named_modules())
    written = {}
    for name, group in groups.items():
        module: Any = modules[name.removesuffix(".weight")]
        written[name] = on_grid(name, module.weight.detach(), module.scale, asked.bits, group)
    state = model.state_dict()
    odd = [
        name
        for name, tensor in original.items()
        if name not in written and not torch.equal(state[name], tensor.to(state[name].dtype))
    ]
    if odd:
        raise SystemExit(f"the peer changed what it was not to: {odd}")
    facts = {name: value for name, value in given.items() if name != "dataset"}
    packages = ("auto-round", "torch", "transformers")
    hand_over(asked, written, original, clock, packages, options=facts)


if __name__ == "__main__":
    main()
