"""Compare what lmms-eval and `gracec eval` found on one folder of questions, answer by answer.

    gracec eval DIR --data QUESTIONS --no-blind --json > eval.json
    python examples/lmms_eval/compare.py NAME eval.json LMMS_OUTPUT \\
        --out docs/results/lmms_eval.json

LMMS_OUTPUT is the --output_path of lmms-eval, run with --log_samples. --out adds the model NAME to
the file; docs/evaluation.md quotes it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

TASK = "emojivqa"


def newest(folder: Path, pattern: str) -> Path:
    """The newest file of a pattern below a folder."""
    found = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"no {pattern} in {folder}; run lmms-eval with --log_samples")
    return found[-1]


def compare(evaluated: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Accuracies of both, and how many answers are equal."""
    results = json.loads(newest(folder, "*results.json").read_text(encoding="utf-8"))
    scores = results["results"][TASK]
    lines = newest(folder, f"*samples_{TASK}.jsonl").read_text(encoding="utf-8").splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))
    pairs = zip(samples, evaluated["predictions"], strict=True)
    ours = {"overall": evaluated["overall"]["accuracy"]}
    theirs = {"overall": scores["exact_match,none"]}
    for kind, score in evaluated["types"].items():
        ours[kind] = score["accuracy"]
        theirs[kind] = scores[f"exact_match_{kind},none"]
    return {
        "questions": len(samples),
        "equal_answers": sum(s["filtered_resps"] == one["predicted"] for s, one in pairs),
        "gracec_eval": ours,
        "lmms_eval": theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the model")
    parser.add_argument("evaluated", type=Path, help="output of gracec eval --json")
    parser.add_argument("folder", type=Path, help="--output_path of lmms-eval")
    parser.add_argument("--out", type=Path, help="file to add the figures to")
    arguments = parser.parse_args()
    found = compare(json.loads(arguments.evaluated.read_text(encoding="utf-8")), arguments.folder)
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        text = json.dumps({**known, arguments.name: found}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
