"""Answers of the shipped student by each backend, beside dense float32 weights of the same values.

python benchmarks/onnx_answers.py       writes benchmarks/results/onnx_answers.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import write_result

import gracec
from gracec.evaluate import VqaReport, evaluate_vqa, load_samples
from gracec.models import load_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "emojivqa"
VARIANTS = (("qdq", "faithful"), ("matmulnbits", "faithful"), ("qdq", "fast"))


def row(backend: str, report: VqaReport, reference: VqaReport, gates: Any) -> dict[str, Any]:
    """How often a backend answers otherwise, and how far its logits are, as its gates found."""
    pairs = zip(report.predictions, reference.predictions, strict=True)
    return {
        "backend": backend,
        "questions": len(report.predictions),
        "percent_right": round(100 * report.overall.accuracy, 2),
        "other_answers": sum(one.predicted != other.predicted for one, other in pairs),
        "kl_nats": None if gates is None else float(f"{gates['kl']:.1e}"),
    }


def measure(questions: Path, folder: Path) -> list[dict[str, Any]]:
    samples = load_samples(questions)
    compiled = gracec.compile(EXAMPLE / "student", "w4a16-ptq")
    tensors = dict(compiled.model.state_dict())
    tensors |= {fqn: weight.dequantize() for fqn, weight in compiled.weights.items()}
    dense = load_model(EXAMPLE / "student", torch.float32)
    dense.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})

    def asked(model: Any) -> VqaReport:
        return evaluate_vqa(model, compiled.processor, samples, blind=False)

    reference = asked(dense)
    rows = [row("dense float32, torch", reference, reference, None)]
    found = compiled.report.gates["logits"]
    rows.append(row("torchao, bfloat16", asked(compiled), reference, found))
    for ops, mode in VARIANTS:
        directory = folder / f"{ops}-{mode}"
        compiled.export_onnx(directory, ops=ops, mode=mode)
        session = json.loads((directory / "onnx" / "session.json").read_text(encoding="utf-8"))
        report = asked(gracec.load(directory, backend="onnx"))
        rows.append(row(f"onnx, {ops}, {mode}", report, reference, session["gates"]["logits"]))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=300, help="of the test split")
    count = parser.parse_args(arguments).questions
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        command = [sys.executable, str(EXAMPLE / "make_dataset.py"), "--split", "test"]
        command += ["--limit", str(count), "--out", str(data)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = measure(data, Path(folder))
    write_result("onnx_answers", "answers of the shipped student, w4a16-ptq", rows, load=load)


if __name__ == "__main__":
    main()
