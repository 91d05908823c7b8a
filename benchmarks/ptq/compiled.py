"""gracec, through its public API, as the peers are run: a process, windows in, weights out.

The decoder is compiled within a LLaVA whose vision tower is a stand-in. The words of its processor
are the numbers of the tokens, so that text which calibrates is exactly the windows that the peers
get: a record {"text": "198 504 ..."} each. What is timed is `gracec.compile`: capture, calibration,
gates and packing. With --runtime the runtime itself is measured, into scores.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from evaluator import load, measure, of_original
from handover import Clock, calibration, hand_over, options
from texts import windows
from torch import Tensor
from transformers import AutoTokenizer

import gracec
from gracec.capture.greedy import prompt_logits
from gracec.recipe import Recipe
from gracec.store import read_store

sys.path.append(str(Path(__file__).resolve().parents[1] / "decode"))
from models import as_llava, processor

PREFIX = "model.language_model."
SEED = 0


def recipe(asked: argparse.Namespace, ids: Tensor | None) -> Recipe:
    """Post-training quantization of the decoder; all else as a user has it by default."""
    fields: dict[str, Any] = {} if asked.method != "scales" else of_scales()
    fields |= {
        "name": f"w{asked.bits}-g{asked.group_size}-{asked.method}",
        "weights": {
            "decoder": {
                "bits": asked.bits,
                "group_size": asked.group_size,
                "signed": asked.method != "weights",
            }
        },
    }
    if "calibration" in Recipe.model_fields:
        method = "auto" if asked.method == "scales" else asked.method
        fields["calibration"] = {"method": method, "seed": SEED}
        if ids is not None:
            fields["calibration"] |= {"samples": len(ids), "tokens": ids.numel()}
    elif asked.method not in ("weights", "scales"):
        raise SystemExit("this gracec has no `calibration` in its recipes")
    return Recipe.from_dict(fields)


def of_scales() -> dict[str, Any]:
    """The training of w4a16-scales."""
    return {"training": Recipe.load("w4a16-scales").to_dict()["training"]}


def codes_of(directory: Path, original: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """Codes times scales, and other tensors that are not the original's in their own dtype."""
    store = read_store(directory)
    own = {name: f"model.{name.removeprefix(PREFIX)}" for name in store.weights}
    weights = {own[name]: weight.dequantize() for name, weight in store.weights.items()}
    also = {}
    for name, tensor in store.others.items():
        inner = f"model.{name.removeprefix(PREFIX)}" if name.startswith(PREFIX) else name
        before = original.get(inner)
        if before is not None and not torch.equal(tensor, before.to(tensor.dtype)):
            also[inner] = tensor
    return weights, also


def runtime(compiled: Any, name: str, folder: Path) -> Any:
    """Token ids -> logits by positions, of a runtime."""
    packed: Any = compiled.model
    found: Any = None
    if name.startswith("onnx-"):
        compiled.export_onnx(folder, mode=name.removeprefix("onnx-"))
        found = gracec.load(folder, backend="onnx")

    def logits(ids: Tensor) -> Any:
        if found is None:
            whole = packed(input_ids=ids).logits[0].float()
        else:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            whole = prompt_logits(found, inputs)[0].float()
        return lambda positions: whole[positions]

    return logits


def main() -> None:
    asked = options(("weights", "auto", "scales"))
    ids = None if asked.windows is None else calibration(asked)
    decoder = load(asked.model)
    original = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    words = processor(decoder.config.vocab_size)
    given: dict[str, Any] = {}
    if ids is not None:
        texts = [" ".join(str(number) for number in row) for row in ids.tolist()]
        given["train_data"] = [{"text": text} for text in texts]
    model = as_llava(decoder)
    del decoder
    clock = Clock()
    with clock.running():
        compiled = gracec.compile(
            model, recipe(asked, ids), processor=words, inplace=True, progress=False, **given
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "artifact"
        compiled.save_pretrained(target, formats=())
        weights, also = codes_of(target, original)
        facts = {"recipe": compiled.report.recipe, "notes": list(map(str, compiled.report.notes))}
        hand_over(asked, weights, original, clock, ("torch", "torchao"), also=also, **facts)
        if asked.runtime:
            decoder = load(asked.model)
            measured = windows(AutoTokenizer.from_pretrained(asked.model), "measured")
            before = of_original(decoder, measured, asked.out.parent / "original.pt")
            logits = runtime(compiled, asked.runtime, Path(folder) / "onnx")
            scores = measure(logits, before, measured)
            (asked.out / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
