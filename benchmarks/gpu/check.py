"""Everything that gracec promises of a GPU, checked and measured in one go, in at most 8 minutes.

    python benchmarks/gpu/check.py                                     writes results/gpu.json
    python benchmarks/gpu/check.py --device cpu --small --out FOLDER   tries the script without one

INT4 kernels beside bfloat16, a LLaVA of 1.4 billion random weights through all gates, its decoding,
its training, EmojiVQA by GRACE, and an artifact that goes to the disk and back. The file is
written after each item. What failed, was stopped or not reached is in it, with the reason.

It takes torch 2.11 or newer with CUDA and no network. A machine that has neither gracec nor its
libraries needs, beside what comes with torch, torchao, transformers, tokenizers, accelerate,
safetensors, pydantic, compressed-tensors, rich, pillow and their dependencies: `pip download` them
elsewhere, and set PYTHONPATH to a checkout.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import gpu_page  # noqa: E402
import linears  # noqa: E402
import torch  # noqa: E402
from answers import Answers  # noqa: E402
from machine import Machine  # noqa: E402
from measure import RESULTS  # noqa: E402
from sections import Figures, Section, run  # noqa: E402
from serving import Serving  # noqa: E402
from steps import Steps  # noqa: E402

SECONDS = 450
"""Of the eight minutes; the rest is for what is imported."""
WHAT = "gracec on a GPU: kernels, a LLaVA of 1.4 billion weights, training, EmojiVQA"
COMMAND = "python benchmarks/gpu/check.py"


def sections(machine: Machine, folder: Path) -> list[Section]:
    """What is measured, with shares of the time; models live as long as their section."""
    return [
        Section("kernels", 50, partial(linears.items, machine), begins=False),
        Section("serving", 170, lambda: Serving(machine).items()),
        Section("training", 130, lambda: Steps(machine).items()),
        Section("EmojiVQA", 120, lambda: Answers(machine, folder).items()),
    ]


def write(machine_facts: dict[str, Any], out: Path, rows: list[Figures]) -> None:
    """The results so far, beside the targets that they are held against."""
    result = {
        "what": WHAT,
        "command": COMMAND,
        "environment": machine_facts,
        "rows": gpu_page.against_targets(rows),
        "measured": rows,
    }
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, to try the script")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--only", default="", help="names of sections, with commas")
    parser.add_argument("--out", type=Path, help="folder; by default that of committed results")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small --out FOLDER tries the script")
    machine = Machine(options.device, small=options.small)
    if options.out is None and (options.small or not machine.gpu or options.only):
        parser.error("what is measured is no result of a GPU: give --out FOLDER")
    out = options.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    facts = machine.describe(os.getloadavg()[0])
    print(json.dumps(facts), flush=True)
    with tempfile.TemporaryDirectory(prefix="gracec-gpu-") as folder:
        chosen = sections(machine, Path(folder))
        if options.only:
            chosen = [one for one in chosen if one.name in options.only.split(",")]
        rows = run(chosen, options.seconds, partial(write, facts, out))
    print(gpu_page.text(json.loads((out / "gpu.json").read_text(encoding="utf-8"))))
    return 1 if any(row["state"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
