"""Quantize the EmojiVQA student with llm-compressor, and examine each; what is done stays.

    python examples/emojivqa/make_dataset.py --split train --limit 2500 --out DATA
    python benchmarks/evidence/peers.py --python PEER/bin/python --data DATA [--only 'peer-gptq-*']

PEER is the environment of peer_requirements.txt. 512 of the questions calibrate, drawn by a seed;
rounding to nearest looks at none, so that it has one seed. Only the decoder is quantized, in groups
of 128. A run writes benchmarks/results/evidence/NAME-SEED.json, as run.py does for gracec's own.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "evidence"
LABELS = {2: "w2d", 3: "w3d", 4: "g128"}
"""Bits -> how a row of them is called."""
METHODS = ("rtn", "gptq", "awq")
SEEDS = (0, 1, 2)
SAMPLES = 512


def jobs() -> Iterator[tuple[str, int, int]]:
    """(method, bits, seed), the cheap ones first."""
    for method in METHODS:
        for seed in SEEDS[:1] if method == "rtn" else SEEDS:
            yield from ((method, bits, seed) for bits in LABELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="of the peer's environment")
    parser.add_argument("--data", type=Path, required=True, help="as make_dataset.py writes it")
    parser.add_argument("--only", default="*", help="a pattern of names")
    options = parser.parse_args()
    for method, bits, seed in jobs():
        name = f"peer-{method}-{LABELS[bits]}"
        if not fnmatch.fnmatch(name, options.only) or (RESULTS / f"{name}-{seed}.json").exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [options.python, HERE / "peer_gptq.py", "--method", method, "--bits", bits]
            command += ["--seed", seed, "--samples", SAMPLES, "--data", options.data]
            examine = [sys.executable, HERE / "run.py", "--name", name, "--seed", seed]
            for line in ([*command, "--out", folder], [*examine, "--model", folder]):
                words = [str(word) for word in line]
                if subprocess.run(words, stdout=subprocess.DEVNULL).returncode:
                    print(f"{name}-{seed}: failed", flush=True)
                    break
            else:
                print(f"{name}-{seed}: done", flush=True)


if __name__ == "__main__":
    main()
