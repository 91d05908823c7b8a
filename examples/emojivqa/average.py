"""Export the mean of the weights that several stages of one training left.

    cp -r runs/teacher runs/answered        # after the stage, before the next one
    python average.py --model teacher runs/answered runs/teacher --out teacher

Later stages start from the weights of earlier ones, so their mean is a model too, and often better
than each: the noise of their last steps cancels. The last folder's training is the one recorded.
"""

import argparse
import json
from pathlib import Path

import torch
from emojivqa.models import SIZES, build, export
from safetensors.torch import load_file
from torch import Tensor


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def average(name: str, folders: list[Path], out: Path) -> None:
    histories = [json.loads((folder / "history.json").read_text()) for folder in folders]
    model = build(name)
    states = [load_file(folder / "model.safetensors") for folder in folders]
    model.load_state_dict(mean(states), strict=False)
    model.tie_weights()
    export(model, out)
    record = {**histories[-1], "averaged": [history["steps"] for history in histories]}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders that train.py wrote")
    parser.add_argument("--model", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    average(args.model, args.runs, args.out)


if __name__ == "__main__":
    main()
