"""Quantize and measure every cell of the comparison; what is done is not done again.

    python benchmarks/decode/prepare.py --model smollm2     makes SmolLM2; Gemma: see README.md
    python benchmarks/ptq/run.py --python llmcompressor=PEER/bin/python autoround=PEER/bin/python \\
        gptqmodel=PEER/bin/python
    python benchmarks/ptq/run.py --only 'smollm2-*-w4-g128' 'gemma3-gracec-*'
    python benchmarks/ptq/run.py --list

A tool whose environment is not named is left out; torchao and gracec run in this one. A cell writes
benchmarks/results/ptq/NAME.json. One that fails is said and tried again in the next run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import MODELS, WORK, Cell, cells

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import RESULTS, environment

HERE = Path(__file__).resolve().parent
FOLDER = RESULTS / "ptq"
SCRIPTS = {"gracec": "compiled.py"}
OWN = ("gracec", "torchao")
"""Tools that are in this environment."""


def prepared(model: str) -> Path:
    """The folder of a model, with the windows of every protocol in it."""
    import texts
    from transformers import AutoTokenizer

    folder = WORK / model
    folder.mkdir(parents=True, exist_ok=True)
    for protocol in texts.WINDOWS:
        path = folder / f"{protocol}.json"
        if not path.is_file():
            ids = texts.windows(AutoTokenizer.from_pretrained(MODELS[model]), protocol)
            path.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    return folder


def quantize(cell: Cell, python: str, folder: Path) -> Path:
    """Run a tool; the folder that it handed over."""
    handed = folder / cell.name
    shutil.rmtree(handed, ignore_errors=True)
    script = HERE / SCRIPTS.get(cell.tool, f"peer_{cell.tool}.py")
    command = [python, script, "--method", cell.method, "--bits", cell.bits]
    command += ["--group-size", cell.group_size, "--model", MODELS[cell.model], "--out", handed]
    if cell.protocol != "none":
        command += ["--windows", folder / f"{cell.protocol}.json"]
    if cell.runtime:
        command += ["--runtime", cell.runtime]
    log = folder / f"{cell.name}.log"
    with log.open("w") as file:
        done = subprocess.run([str(part) for part in command], stdout=file, stderr=file)
    if done.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip() or "failed").splitlines()
        raise RuntimeError(f"{last[-1]} ({log})")
    return handed


def evaluate(cell: Cell, handed: Path, folder: Path) -> dict[str, Any]:
    """Scores of what was handed over."""
    if (handed / "scores.json").is_file():
        scores: dict[str, Any] = json.loads((handed / "scores.json").read_text(encoding="utf-8"))
        return scores
    import evaluator
    import texts
    from transformers import AutoTokenizer

    decoder = evaluator.load(MODELS[cell.model])
    ids = texts.windows(AutoTokenizer.from_pretrained(MODELS[cell.model]), "measured")
    original = evaluator.of_original(decoder, ids, folder / "original.pt")
    evaluator.put(decoder, handed, cell.bits, cell.group_size)
    return evaluator.measure(evaluator.of_decoder(decoder), original, ids)


def run(cell: Cell, python: str) -> dict[str, Any]:
    """One cell: everything that is known of it."""
    folder = prepared(cell.model)
    handed = quantize(cell, python, folder)
    scores = evaluate(cell, handed, folder)
    made = json.loads((handed / "made.json").read_text(encoding="utf-8"))
    shutil.rmtree(handed)
    found: dict[str, Any] = {
        "model": cell.model,
        "tool": cell.tool,
        "method": cell.method,
        "calibration": cell.protocol,
        "bits": cell.bits,
        "group_size": cell.group_size,
        "runtime": cell.runtime,
        **scores,
        "made": made,
        "environment": environment(os.getloadavg()[0]),
    }
    if cell.protocol != "none":
        import texts
        import torch

        ids = torch.tensor(json.loads((folder / f"{cell.protocol}.json").read_text("utf-8")))
        found["tokens"] = {"windows": list(ids.shape), "sha256": texts.fingerprint(ids)}
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of cells")
    parser.add_argument("--skip", nargs="*", default=[], help="tools that are left out")
    parser.add_argument("--python", nargs="*", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--list", action="store_true", help="show what there is")
    options = parser.parse_args(arguments)
    pythons = dict.fromkeys(OWN, sys.executable)
    pythons |= dict(pair.split("=", 1) for pair in options.python)
    for cell in cells():
        path = FOLDER / f"{cell.name}.json"
        if not any(fnmatch.fnmatch(cell.name, pattern) for pattern in options.only):
            continue
        if options.list:
            print(f"{cell.name}: {'done' if path.exists() else 'missing'}")
            continue
        unknown = cell.tool not in pythons or not MODELS[cell.model].is_dir()
        if path.exists() or unknown or cell.tool in options.skip:
            continue
        start = time.perf_counter()
        try:
            found = run(cell, pythons[cell.tool])
        except (RuntimeError, SystemExit) as error:
            print(f"{cell.name}: failed: {error}", flush=True)
            continue
        write(path, found)
        change = f"{found['loss_change_nats']:+.4f} ±{found['standard_error']:.4f}"
        print(f"{cell.name}: {change}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
