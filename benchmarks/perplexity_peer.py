"""GPTQ and rounding to nearest by llm-compressor on a decoder: a peer of `perplexity.py`.

    PEER/bin/python benchmarks/perplexity_peer.py --method gptq --group-size 128 --model HF \\
        --calibration ids.json --out DIR

The preset W4A16 with another group, symmetric; everything else is the peer's default. What is
quantized is what gracec quantizes: the attention and MLP linears. Where a group does not divide the
columns of a linear, which the peer refuses, the group is half as long, as gracec has it. DIR has
the float32 values after dequantization. Nothing here imports gracec.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent / "evidence"))
from peer_gptq import PACKAGES, check_grid, dequantized

MODIFIERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier}


def fitting(group_size: int, columns: int) -> int:
    """The group, halved until it divides the columns."""
    while columns % group_size:
        group_size //= 2
    return group_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=MODIFIERS, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    windows = torch.tensor(json.loads(options.calibration.read_text(encoding="utf-8")))
    batches = [
        {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in windows
    ]
    groups = {
        name: fitting(options.group_size, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    schemes = {}
    for size in sorted(set(groups.values())):
        names = [name for name, group in groups.items() if group == size]
        scheme = preset_name_to_scheme("W4A16", names)
        weights = scheme.weights.model_copy(update={"group_size": size})
        schemes[f"group_{size}"] = scheme.model_copy(update={"weights": weights})
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(options.model),
        recipe=[MODIFIERS[options.method](config_groups=schemes, ignore=["lm_head"])],
        dataset=DataLoader(batches, batch_size=None),
        num_calibration_samples=len(batches),
        sequential_targets=["LlamaDecoderLayer"],
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    written: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    expected = written.config.num_hidden_layers * 7
    if len(modules) != expected:
        raise SystemExit(f"the peer quantized {len(modules)} linears, not {expected}")
    target = written.state_dict()
    for name, module in modules.items():
        weight, scale = dequantized(module)
        check_grid(name, weight, scale, 4, groups[name])
        target[f"{name}.weight"].copy_(weight)
    quantized = {f"{name}.weight" for name in modules}
    changed = [n for n in target if n not in quantized and not torch.equal(target[n], state[n])]
    if changed:
        raise SystemExit(f"the peer changed what it was not to: {changed}")
    written.save_pretrained(options.out)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    (options.out / "peer.json").write_text(json.dumps(versions), encoding="utf-8")


if __name__ == "__main__":
    main()
