"""GPTQ, AWQ and rounding to nearest by llm-compressor, on the EmojiVQA student: a peer.

    python examples/emojivqa/make_dataset.py --split train --limit 256 --out DATA
    PEER/bin/python benchmarks/evidence/peer_gptq.py --method gptq --bits 4 --group-size 128 \\
        --data DATA --out DIR

PEER is an environment of its own: peer_requirements.txt says how to make it. Nothing here imports
gracec.

What is quantized: the attention and MLP linears of the language model, 28 of them, and nothing
else. The student is loaded in float32 and calibrated on images, questions and answers through its
own processor and chat template. DIR is an ordinary Hugging Face directory in float32 whose
quantized linears hold the values after dequantization, so that one evaluator scores it with the
arithmetic it uses for any other model, and peer.json says how it was made. Each written weight is
checked to lie on its grid: integers of `bits` bits times one scale per group.

The scheme is llm-compressor's preset W<bits>A16: symmetric, signed, rounding into
[-2^(bits-1), 2^(bits-1) - 1], with a scale of the largest magnitude over (2^bits - 1) / 2. Such
presets exist for 2 to 8 bits, other widths are refused; their group of 128 is replaced by
`--group-size`. All else is the peer's default: for GPTQ activation ordering "static" (columns are
visited by activation, groups stay as they are), blocks of 128, dampening 0.01; for AWQ duo scaling
and 20 grid points. `--actorder none` and `--observer` (memoryless_mse searches the scales) change
that.

AWQ scales the inputs of its linears up and divides the norms or the linears before them. The norms
it changes so are listed in peer.json as `also_changed`. Without an accelerator it stops in torch
(0.14.0.1), at pinning memory, which is switched off here and listed as `patched`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ROOT / "examples" / "emojivqa" / "student"
LINEARS = re.compile(
    r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
AWQ_CHANGES = re.compile(
    r"model\.language_model\.layers\.\d+\.(input|post_attention)_layernorm\.weight"
)
EXPECTED = 28
BLOCK = "LlamaDecoderLayer"
BITS = range(2, 9)
METHODS = ("gptq", "awq", "rtn")
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "safetensors")


# The grid


def levels(weight: Tensor, group_size: int) -> int:
    """The largest number of distinct values in a group of [rows, columns]."""
    grouped = weight.reshape(-1, group_size).sort(dim=1).values
    return int((grouped[:, 1:] != grouped[:, :-1]).sum(dim=1).max()) + 1


def check_grid(name: str, weight: Tensor, scale: Tensor, bits: int, group_size: int) -> int:
    """Levels of [rows, columns] on [rows, columns / group_size] scales; raises where off the grid.

    Every value must be, bit for bit, a signed integer of `bits` bits times the scale of its group.
    """
    rows, columns = weight.shape
    if columns % group_size or scale.shape != (rows, columns // group_size):
        raise ValueError(f"{name}: {tuple(scale.shape)} scales for {rows} x {columns} weights")
    steps = scale.repeat_interleave(group_size, dim=1)
    codes = torch.round(weight / steps)
    half = 2 ** (bits - 1)
    if codes.min() < -half or codes.max() > half - 1:
        raise ValueError(f"{name}: codes from {codes.min()} to {codes.max()} for {bits} bits")
    off = int((codes * steps != weight).sum())
    if off:
        raise ValueError(f"{name}: {off} of {weight.numel()} values are not integers times scales")
    found = levels(weight, group_size)
    if found > 2**bits:
        raise ValueError(f"{name}: {found} levels in a group for {bits} bits")
    return found


# Calibration


def chosen(data: Path, samples: int, seed: int) -> list[dict[str, str]]:
    """`samples` questions of a folder, drawn and ordered by the seed."""
    lines = (data / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    if len(questions) < samples:
        raise SystemExit(f"{data} has {len(questions)} questions; --samples asks for {samples}")
    return random.Random(seed).sample(questions, samples)


def encoded(processor: Any, data: Path, questions: Sequence[dict[str, str]]) -> list[dict]:
    """Each question with its image and answer as the model takes it, a batch of one."""
    from PIL import Image

    batches = []
    for question in questions:
        with Image.open(data / question["image"]) as file:
            image = file.convert("RGB")
        asked = [{"type": "image", "image": image}, {"type": "text", "text": question["question"]}]
        answered = [{"type": "text", "text": question["answer"]}]
        turns = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
        batch = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt"
        )
        batches.append(dict(batch))
    return batches


# The peer


def recipe(
    method: str, bits: int, group_size: int, actorder: str, observer: str | None, tower: str
) -> list[Any]:
    """llm-compressor's modifiers. `tower` is a regular expression of what is not quantized."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    scheme = preset_name_to_scheme(f"W{bits}A16", ["re:.*language_model\\.layers.*_proj$"])
    weights = scheme.weights.model_copy(update={"group_size": group_size})
    if not weights.symmetric or str(weights.strategy) != "group":
        raise SystemExit(f"the peer's preset W{bits}A16 is not symmetric and per group")
    if observer is not None:
        weights = weights.model_copy(update={"observer": observer})
    scheme = scheme.model_copy(update={"weights": weights})
    options: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head", tower]}
    if method == "rtn":
        return [QuantizationModifier(**options)]
    if method == "gptq":
        order = {} if actorder == "static" else {"actorder": None}
        return [GPTQModifier(**options, **order)]
    # The peer's default mappings, kept to the language model: the vision tower has layers of the
    # same names.
    layer = r"re:.*language_model\.layers\.\d+"
    attention = [rf"{layer}\.self_attn\.{x}_proj$" for x in "qkv"]
    gated = [rf"{layer}\.mlp\.{x}_proj$" for x in ("gate", "up")]
    mappings = [
        AWQMapping(rf"{layer}\.input_layernorm$", attention),
        AWQMapping(attention[2], [rf"{layer}\.self_attn\.o_proj$"]),
        AWQMapping(rf"{layer}\.post_attention_layernorm$", gated),
        AWQMapping(gated[1], [rf"{layer}\.mlp\.down_proj$"]),
    ]
    return [AWQModifier(mappings=mappings), QuantizationModifier(**options)]


def without_pinning() -> list[str]:
    """Let AWQ run without an accelerator; what was replaced in the peer.

    Version 0.14.0.1 pins its cached activations before it copies them to the accelerator, also
    where there is none, which torch refuses. Pinning changes no value.
    """
    if torch.accelerator.is_available():
        return []
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    return ["IntermediatesCache.pin_memory does nothing"]


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the peer quantized, by name."""
    from compressed_tensors.quantization.utils import is_module_quantized

    return {name: module for name, module in model.named_modules() if is_module_quantized(module)}


def dequantized(module: nn.Module) -> tuple[Tensor, Tensor]:
    """What the peer computes with in place of the weight, and the scales [rows, groups]."""
    from compressed_tensors.quantization import fake_quantize

    arguments = module.quantization_scheme.weights
    weight = fake_quantize(
        module.weight.detach(), module.weight_scale, module.weight_zero_point, arguments
    )
    if bool(module.weight_zero_point.any()):
        raise ValueError("a symmetric scheme with a zero point")
    return weight, module.weight_scale.detach()


def in_module(name: str) -> str:
    """The name in the loaded LLaVA of a tensor in its checkpoint."""
    return "model." + name.replace("language_model.model.", "language_model.")


def in_file(name: str) -> str:
    """The reverse of `in_module`."""
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def changed(model: nn.Module, original: Mapping[str, Tensor]) -> list[str]:
    """Of some tensors by module name, those that the model has otherwise."""
    state = model.state_dict()
    return sorted(name for name in original if not torch.equal(state[name], original[name]))


def described(module: nn.Module) -> dict[str, Any]:
    """The weight scheme as the peer resolved it."""
    arguments = json.loads(module.quantization_scheme.weights.model_dump_json(exclude_none=True))
    return {key: value for key, value in arguments.items() if value not in ({}, [])}


def run(args: argparse.Namespace) -> None:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    stored = load_file(args.model / "model.safetensors")
    original = {in_module(name): tensor.float() for name, tensor in stored.items()}
    if changed(model, original):
        raise SystemExit("this version of transformers does not load the weights as they are")
    expected = sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and LINEARS.fullmatch(name)
    )
    if len(expected) != EXPECTED:
        raise SystemExit(f"{len(expected)} linears in the language model, not {EXPECTED}")

    questions = chosen(args.data, args.samples, args.seed)
    batches = encoded(processor, args.data, questions)
    tower = r"re:.*(vision_tower|multi_modal_projector).*"
    modifiers = recipe(args.method, args.bits, args.group_size, args.actorder, args.observer, tower)
    patched = without_pinning() if args.method == "awq" else []
    began = time.perf_counter()
    oneshot(
        model=model,
        processor=processor,
        recipe=modifiers,
        dataset=DataLoader(batches, batch_size=None),
        num_calibration_samples=len(batches),
        sequential_targets=[BLOCK],
    )
    seconds = time.perf_counter() - began

    modules = quantized(model)
    if sorted(modules) != expected:
        odd = sorted(set(modules) ^ set(expected))
        raise SystemExit(f"the peer quantized {len(modules)} modules; unexpected or left: {odd}")
    weights = {f"{name}.weight" for name in modules}
    also = [name for name in changed(model, original) if name not in weights]
    odd = [name for name in also if args.method != "awq" or not AWQ_CHANGES.fullmatch(name)]
    if odd:
        raise SystemExit(f"the peer changed what it was not to: {odd}")
    written = dict(original)
    written.update({name: model.state_dict()[name].detach().clone() for name in also})
    found = {}
    for name, module in modules.items():
        weight, scale = dequantized(module)
        found[name] = check_grid(name, weight, scale, args.bits, args.group_size)
        written[f"{name}.weight"] = weight.contiguous()

    write(args.model, args.out, written)
    check_written(args.out, modules, args.bits, args.group_size)
    report = {
        "tool": "llm-compressor",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "method": args.method,
        "bits": args.bits,
        "group_size": args.group_size,
        "seed": args.seed,
        "scheme": described(next(iter(modules.values()))),
        "options": options_of(modifiers),
        "patched": patched,
        "calibration": {
            "split": "train",
            "questions": len(questions),
            "images": len({question["image"] for question in questions}),
            "drawn_from": len((args.data / "samples.jsonl").read_text().splitlines()),
            "used": args.method != "rtn",
            "tokens": sum(batch["input_ids"].shape[1] for batch in batches),
        },
        "modules": expected,
        "also_changed": also,
        "levels": {"largest": max(found.values()), "allowed": 2**args.bits},
        "relative_weight_error": weight_error(written, original, weights, also),
        "seconds": round(seconds, 1),
    }
    (args.out / "peer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "modules"}, indent=1))


def weight_error(
    written: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    names: Iterable[str],
    rescaled: Sequence[str],
) -> float | None:
    """Distance from the original over its norm; None where AWQ rescaled the weights besides."""
    if rescaled:
        return None
    pairs = [(written[name].double(), original[name].double()) for name in names]
    error = sum(float((new - old).square().sum()) for new, old in pairs)
    return round((error / sum(float(old.square().sum()) for _, old in pairs)) ** 0.5, 5)


def options_of(modifiers: Sequence[Any]) -> dict[str, Any]:
    """What each modifier ran with, its defaults included."""
    names = ("block_size", "dampening_frac", "duo_scaling", "n_grid")
    return {
        type(modifier).__name__: {
            name: getattr(modifier, name) for name in names if hasattr(modifier, name)
        }
        for modifier in modifiers
    }


def write(source: Path, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """The files of a model folder with other weights, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = {in_file(name): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def check_written(folder: Path, modules: Iterable[str], bits: int, group_size: int) -> None:
    """The file itself: float32, and at most 2^bits levels in every group."""
    stored = load_file(folder / "model.safetensors")
    for name in modules:
        weight = stored[in_file(f"{name}.weight")]
        if weight.dtype != torch.float32 or levels(weight, group_size) > 2**bits:
            raise SystemExit(f"{folder}: {name} is not on a grid of {bits} bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration set")
    parser.add_argument("--actorder", choices=("static", "none"), default="static", help="of GPTQ")
    parser.add_argument("--observer", help="of the weights (default: the peer's)")
    parser.add_argument("--samples", type=int, default=256, help="questions to calibrate on")
    parser.add_argument("--model", type=Path, default=STUDENT)
    parser.add_argument("--data", type=Path, required=True, help="as make_dataset.py writes it")
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
