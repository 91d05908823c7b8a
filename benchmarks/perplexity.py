"""What rounding to INT4 costs a language model with real weights: SmolLM2-135M on English prose.

python benchmarks/decode/prepare.py --model smollm2       makes the model, build/decode/smollm2/hf
python benchmarks/perplexity.py --peers PEER/bin/python   writes benchmarks/results/perplexity.json

The weights are those of a Q4_1 file, dequantized, so the baseline has lost some precision already;
they are rounded anew on another grid: symmetric, and 64 or 128 features to a scale (64 where 128
does not divide the features, which is so in all linears but one of each block). The text is the
language reference that comes with Python. Windows of 512 tokens; the first token of each is only
read. Nothing is trained. The model is the decoder of a LLaVA, since that is what gracec compiles,
and is given text alone.

PEER is the environment of benchmarks/evidence/peer_requirements.txt. GPTQ is calibrated on other
windows of the text, behind those that are measured. The weights of the peers are evaluated in
float32 after dequantization, as the row `codes times scales` is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from measure import write_result
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

import gracec
from gracec.capture.greedy import prompt_logits
from gracec.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "build" / "decode" / "smollm2" / "hf"
LENGTH, WINDOWS, CALIBRATION = 512, 16, 64
GROUPS = (64, 128)
METHODS = ("rtn", "gptq")
Logits = Callable[[Tensor], Tensor]
"""Token ids [1, T] -> logits [1, T, V]."""

sys.path.insert(0, str(Path(__file__).parent / "decode"))


def windows(model: Path) -> Tensor:
    """Token ids [WINDOWS + CALIBRATION, LENGTH], evenly spaced parts of the text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(ids) < WINDOWS + CALIBRATION:
        raise SystemExit(f"the text has {len(ids)} windows, {WINDOWS + CALIBRATION} are needed")
    return ids[: WINDOWS + CALIBRATION]


def losses(logits: Logits, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window, in nats, float64."""
    found = []
    with torch.no_grad():
        for window in ids:
            predicted = logits(window[None])[0, :-1].double()
            found.append(functional.cross_entropy(predicted, window[1:]))
    return torch.stack(found)


def row(name: str, group_size: int | None, found: Tensor, original: Tensor) -> dict[str, Any]:
    """Perplexity, and the paired difference of the loss with its standard error."""
    change = found - original
    return {
        "weights": name,
        "group_size": group_size,
        "perplexity": round(float(found.mean().exp()), 3),
        "loss_change_nats": round(float(change.mean()), 4),
        "standard_error": round(float(change.std() / len(change) ** 0.5), 4),
    }


def compiled_rows(model: Path, group_size: int, folder: Path) -> Iterator[tuple[str, Logits]]:
    """gracec's PTQ: codes times scales in float32, and every runtime that gets those codes."""
    from models import as_llava, load_decoder, processor
    from prepare import decoder_of

    recipe = Recipe.from_dict(
        {"name": "ptq", "weights": {"decoder": {"bits": 4, "group_size": group_size}}}
    )
    decoder = load_decoder(model)
    words = processor(decoder.config.vocab_size)
    compiled = gracec.compile(as_llava(decoder), recipe, processor=words, inplace=True)
    del decoder
    compiled.save_pretrained(folder, formats=())
    yield "gracec PTQ, codes times scales, float32", dense(decoder_of(folder))
    packed: Any = compiled.model
    yield "gracec PTQ, torchao, bfloat16", lambda ids: packed(input_ids=ids).logits
    for mode in ("faithful", "fast"):
        target = folder / mode
        compiled.export_onnx(target, mode=mode)
        found = gracec.load(target, backend="onnx")
        yield f"gracec PTQ, onnx {mode}", text_only(found)


def dense(decoder: Any) -> Logits:
    return lambda ids: decoder(input_ids=ids).logits


def text_only(runtime: Any) -> Logits:
    def logits(ids: Tensor) -> Tensor:
        return prompt_logits(runtime, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    return logits


def peer(python: Path, model: Path, ids: Tensor, method: str, group: int, folder: Path) -> Logits:
    """Weights that llm-compressor rounded."""
    calibration, target = folder / "calibration.json", folder / f"{method}-{group}"
    calibration.write_text(json.dumps(ids[WINDOWS:].tolist()), encoding="utf-8")
    command: list[str | Path] = [python, Path(__file__).with_name("perplexity_peer.py")]
    options = ["--method", method, "--group-size", str(group), "--model", model]
    files = ["--calibration", calibration, "--out", target]
    subprocess.run([*command, *options, *files], check=True, stdout=sys.stderr)
    decoder: Any = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    return dense(decoder.eval())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--peers", type=Path, help="Python of the peers; without it no such rows")
    options = parser.parse_args(arguments)
    if not options.model.is_dir():
        raise SystemExit(f"{options.model} is missing: run benchmarks/decode/prepare.py first")
    load = os.getloadavg()[0]
    ids = windows(options.model)
    measured = ids[:WINDOWS]
    rows: list[dict[str, Any]] = []

    def add(name: str, group: int | None, logits: Logits, original: Tensor | None = None) -> Tensor:
        found = losses(logits, measured)
        rows.append(row(name, group, found, found if original is None else original))
        print(rows[-1], file=sys.stderr, flush=True)
        return found

    decoder: Any = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    original = add("dequantized Q4_1, float32", None, dense(decoder.eval()))
    add("dequantized Q4_1, bfloat16", None, dense(decoder.to(torch.bfloat16)), original)
    del decoder
    versions = {"onnxruntime": version("onnxruntime"), "torchao": version("torchao")}
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUPS:
            made = compiled_rows(options.model, group, Path(folder) / str(group))
            for name, logits in made:
                add(name, group, logits, original)
            for method in METHODS if options.peers else ():
                logits = peer(options.peers, options.model, ids, method, group, Path(folder))
                name = f"llm-compressor {method.upper()}, dequantized, float32"
                add(name, group, logits, original)
        for path in Path(folder).glob("*/peer.json"):
            versions |= {
                f"{name} (peers)": number
                for name, number in json.loads(path.read_text(encoding="utf-8")).items()
            }
    what = f"perplexity of SmolLM2-135M-Instruct on {WINDOWS} windows of {LENGTH} tokens, INT4"
    given = "--peers PEER/bin/python" if options.peers else ""
    write_result("perplexity", what, rows, arguments=given, load=load, versions=versions)


if __name__ == "__main__":
    main()
