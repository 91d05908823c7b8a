"""Answers of the shipped student by each backend, beside dense float32 weights of the same values.

python benchmarks/onnx_answers.py       writes benchmarks/results/onnx_answers.json

The first row is the original; the others are compared with it, and with dense float32 weights
that are the codes times scales of its own recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import write_result

import gracec
from gracec import Recipe
from gracec.demo import write_questions
from gracec.evaluate import VqaReport, evaluate_vqa, load_samples, paired_difference
from gracec.models.loading import load_model, load_processor

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "emojivqa"
HEADS: dict[str, list[tuple[str, str]]] = {
    "kept": [("qdq", "faithful"), ("matmulnbits", "faithful"), ("qdq", "fast")],
    "int8": [("qdq", "faithful"), ("qdq", "fast")],
    "int4": [("qdq", "faithful"), ("qdq", "fast")],
}
"""Head -> operators and modes of the exports; the decoder is that of w4a16-ptq."""


def recipe(head: str) -> Recipe:
    fields = Recipe.load("w4a16-ptq").to_dict()
    if head != "kept":
        fields["weights"]["head"] = {"bits": int(head.removeprefix("int")), "group_size": 128}
    return Recipe.from_dict(fields)


def measure(questions: Path, folder: Path) -> Iterator[dict[str, Any]]:
    samples = load_samples(questions)
    processor = load_processor(EXAMPLE / "student")

    def asked(model: Any) -> VqaReport:
        return evaluate_vqa(model, processor, samples, blind=False)

    original = asked(load_model(EXAMPLE / "student", torch.float32))

    def row(
        backend: str, head: str, report: VqaReport, reference: VqaReport, kl: float | None
    ) -> dict[str, Any]:
        pairs = zip(report.predictions, reference.predictions, strict=True)
        change = paired_difference(report, original)
        return {
            "backend": backend,
            "head": head,
            "percent_right": round(100 * report.overall.accuracy, 2),
            "change_points": round(100 * change.difference, 2),
            "standard_error": round(100 * change.standard_error, 2),
            "other_answers_than_its_codes": sum(a.predicted != b.predicted for a, b in pairs),
            "kl_nats": None if kl is None else float(f"{kl:.1e}"),
        }

    yield row("original, torch float32", "kept", original, original, None)
    for head, exports in HEADS.items():
        compiled = gracec.compile(EXAMPLE / "student", recipe(head))
        tensors = dict(compiled.model.state_dict())
        tensors |= {fqn: weight.dequantize() for fqn, weight in compiled.weights.items()}
        dense = load_model(EXAMPLE / "student", torch.float32)
        if head != "kept":
            dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.detach().clone())
        dense.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        codes = asked(dense)
        yield row("codes times scales, torch float32", head, codes, codes, None)
        found = compiled.report.gates["logits"].kl
        yield row("torchao, bfloat16", head, asked(compiled), codes, found)
        for ops, mode in exports:
            directory = folder / f"{ops}-{mode}-{head}"
            compiled.export_onnx(directory, ops=ops, mode=mode)
            session = json.loads((directory / "onnx" / "session.json").read_text(encoding="utf-8"))
            report = asked(gracec.load(directory, backend="onnx"))
            kl = session["gates"]["logits"]["kl"]
            yield row(f"onnx, {ops}, {mode}", head, report, codes, kl)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=500, help="of the test split")
    count = parser.parse_args(arguments).questions
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_questions(EXAMPLE, "test", data, count)
        rows = list(measure(data, Path(folder)))
    what = f"answers of the shipped student to {count} test questions, decoder of w4a16-ptq"
    write_result("onnx_answers", what, rows, load=load)


if __name__ == "__main__":
    main()
