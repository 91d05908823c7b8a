"""GPTQ, AWQ and rounding to nearest by llm-compressor.

The environment is that of benchmarks/evidence/peer_requirements.txt. The scheme is the preset
W<bits>A16, symmetric, with another group; all else is the peer's default: GPTQ with activation
ordering "static", blocks of 128 and a dampening of .01, AWQ with duo scaling and 20 grid points. A
group that does not divide the columns, which the peer refuses, is halved. AWQ's change of the norms
before the linears is handed over too.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from handover import Clock, calibration, groups_of, hand_over, options
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from peer_gptq import PACKAGES, check_grid, dequantized, options_of, quantized, without_pinning
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def modifiers(method: str, schemes: dict[str, Any]) -> list[Any]:
    given: dict[str, Any] = {"config_groups": schemes, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**given)]
    rounding = QuantizationModifier(**given)
    return [rounding] if method == "rtn" else [AWQModifier(), rounding]


def main() -> None:
    asked = options(("rtn", "gptq", "awq"))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = {
        name.removesuffix(".weight"): group
        for name, group in groups_of(original, asked.group_size).items()
    }
    schemes = {}
    for size in sorted(set(groups.values())):
        names = [name for name, group in groups.items() if group == size]
        scheme = preset_name_to_scheme(f"W{asked.bits}A16", names)
        weights = scheme.weights.model_copy(update={"group_size": size})
        if not weights.symmetric or str(weights.strategy) != "group":
            raise SystemExit("the preset is not symmetric and per group")
        schemes[f"group_{size}"] = scheme.model_copy(update={"weights": weights})
    ids = torch.zeros(1, 8, dtype=torch.long) if asked.windows is None else calibration(asked)
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids
    ]
    recipe = modifiers(asked.method, schemes)
    patched = without_pinning() if asked.method == "awq" else []
    clock = Clock()
    with clock.running():
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(asked.model),
            recipe=recipe,
            dataset=DataLoader(batches, batch_size=None),
            num_calibration_samples=len(batches),
            sequential_targets=[type(model.model.layers[0]).__name__],
        )
    written = {}
    for name, module in quantized(model).items():
        weight, scale = dequantized(module)
        check_grid(name, weight, scale, asked.bits, groups[name])
        written[f"{name}.weight"] = weight
    state = model.state_dict()
    also = {
        name: state[name]
        for name in original
        if name not in written and not torch.equal(state[name], original[name])
    }
    odd = [name for name in also if asked.method != "awq" or "norm" not in name]
    if odd:
        raise SystemExit(f"the peer changed what it was not to: {odd}")
    ran = options_of(recipe)
    hand_over(asked, written, original, clock, PACKAGES, also=also, options=ran, patched=patched)


if __name__ == "__main__":
    main()
