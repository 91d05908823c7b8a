"""Exact match of a model on one split, per question type, beside what needs no image.

    python evaluate.py student --split validation
    python evaluate.py teacher --split validation --against student

Writes results/<model folder>_<split>.json. `chance` answers at random among the type's possible
answers, `majority` always gives the split's most frequent one, `blind` is the model with the
image zeroed. Questions are scored packed (see emojivqa/packing.py), which gives what greedy
generation gives. `--against` adds the difference from another model on the same questions.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from emojivqa.concepts import CATEGORIES, CONCEPTS
from emojivqa.evaluation import exact_match
from emojivqa.packing import arrays
from emojivqa.questions import TYPES, evaluation_questions
from emojivqa.scenes import CELLS
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

HERE = Path(__file__).resolve().parent
SCENES = 800
CHANCE = {
    "name": 1 / len(CONCEPTS),
    "where": 1 / len(CELLS),
    "count": 1 / (len(CELLS) + 1),
    "exist": 1 / 2,
    "category": 1 / len(CATEGORIES),
}


def percent(share: float) -> float:
    return round(100 * share, 2)


def summary(hits: Tensor) -> dict[str, float]:
    """Accuracy and its standard error, in percent, of bool [N]."""
    share = hits.double().mean().item()
    return {"accuracy": percent(share), "stderr": percent((share * (1 - share) / len(hits)) ** 0.5)}


def difference(hits: Tensor, others: Tensor) -> dict[str, float]:
    """Mean paired difference of two bool [N] and its standard error, in percent."""
    change = hits.double() - others.double()
    error = change.std(correction=0).item() / len(change) ** 0.5
    return {"difference": percent(change.mean().item()), "stderr": percent(error)}


def majority(split: str, scenes: int) -> dict[str, float]:
    """Share of the most frequent answer of each type."""
    answers = {kind: Counter() for kind in TYPES}
    for index in range(scenes):
        for question in evaluation_questions(split, index):
            answers[question.type][question.answer] += 1
    return {kind: max(answers[kind].values()) / scenes for kind in TYPES}


def table(results: dict) -> str:
    """The results as a Markdown table."""
    lines = ["| type | exact match % | blind | majority | chance |", "|---|---|---|---|---|"]
    for kind, row in results["types"].items():
        score = f"{row['accuracy']:.1f} ± {row['stderr']:.1f}"
        rest = " | ".join(f"{row[key]:.1f}" for key in ("blind", "majority", "chance"))
        lines.append(f"| {kind} | {score} | {rest} |")
    everything = results["all"]
    score = f"{everything['accuracy']:.1f} ± {everything['stderr']:.1f}"
    lines.append(f"| all | {score} | {everything['blind']:.1f} | | |")
    return "\n".join(lines)


def load(folder: Path) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def evaluate(folder: Path, split: str, scenes: int, against: Path | None = None) -> dict:
    model = load(folder)
    data = arrays(split, range(scenes))
    hits, _ = exact_match(model, split, data)
    blind, _ = exact_match(model, split, data, blind=True)
    most = majority(split, scenes)
    types = {
        kind: {
            **summary(hits[:, column]),
            "blind": percent(blind[:, column].double().mean().item()),
            "majority": percent(most[kind]),
            "chance": percent(CHANCE[kind]),
            "questions": scenes,
        }
        for column, kind in enumerate(TYPES)
    }
    overall = {**summary(hits.flatten()), "blind": percent(blind.double().mean().item())}
    results = {"split": split, "scenes": scenes, "all": overall, "types": types}
    if against is None:
        return results
    others, _ = exact_match(load(against), split, data)
    pairs = {kind: difference(hits[:, i], others[:, i]) for i, kind in enumerate(TYPES)}
    pairs["all"] = difference(hits.flatten(), others.flatten())
    return {**results, "against": {"model": against.resolve().name, **pairs}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a folder that from_pretrained can load")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--scenes", type=int, default=SCENES, help="five questions each")
    parser.add_argument("--against", type=Path, help="another model, to compare with")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    results = evaluate(args.model, args.split, args.scenes, args.against)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.model.resolve().name}_{args.split}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
