"""Train one of the two EmojiVQA models.

    python train.py --model student --stage align --minutes 12
    python train.py --model student --stage answer --minutes 40 --out student

Stage `align` trains the image side alone: every visual token is read as words. Stage `answer`
trains the decoder on packed questions while the image side stays as it is. Stage `joint` trains
everything on both. A run continues from the newest weights in RUNS/<model>, whichever stage made
them. Its learning rate warms up, stays, and falls to zero in the last part of its time or steps,
whichever ends first. `--out` exports the model for `from_pretrained`, unless an earlier run
exported a better one. `--grow-from` replaces the decoder by that of a narrower model, widened;
align the image side to it with `--keep-words`.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emojivqa import losses
from emojivqa.augment import restyle
from emojivqa.evaluation import exact_match
from emojivqa.grow import widen_decoder
from emojivqa.models import SIZES, build, export, pixels
from emojivqa.packing import Layout, cached, layout, questions_of
from emojivqa.questions import TYPES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

RATE = {"student": 2e-3, "teacher": 1e-3}
WARM_UP, FALL = 100, 0.3
IMAGE_SHARE = 0.3
HELD_OUT = 400


@dataclass
class Means:
    """Training figures averaged over some steps; `seen`: share of emoji recognised."""

    align: float = 0.0
    answer: float = 0.0
    seen: float = 0.0
    steps: int = 0

    def add(self, align: Tensor, answer: Tensor, seen: Tensor) -> None:
        self.steps += 1
        for name, value in (("align", align), ("answer", answer), ("seen", seen)):
            old = getattr(self, name)
            setattr(self, name, old + (value.item() - old) / self.steps)


def batch(data: dict[str, np.ndarray], rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Rows of every array: pixels float32 [B, 3, 64, 64], the others int64."""
    taken = {field: torch.from_numpy(data[field][np.sort(rows)]) for field in data}
    integers = {field: t.to(device).long() for field, t in taken.items() if field != "images"}
    return {"pixels": pixels(taken["images"].to(device)), **integers}


def loss_of(
    model: nn.Module, part: dict[str, Tensor], stage: str, form: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """(alignment loss, answer loss or zero, share of emoji recognised) of one batch."""
    with torch.set_grad_enabled(stage != "answer"):
        visual = losses.visual_tokens(model, part["pixels"])
        words = model.get_input_embeddings().weight
        align, seen = losses.alignment(visual, words, part["cells"])
    if stage == "align":
        return align, torch.zeros_like(align), seen
    logits = losses.answer_logits(model, visual, part["tokens"], form)
    targets = losses.answer_targets(part["expected"], form)
    return align, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), seen


def validate(model: nn.Module, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Exact match per question type, and the share of emoji recognised by the image side."""
    with torch.compiler.set_stance("force_eager"):
        hits, seen = exact_match(model, "validation", data)
    return {"seen": seen, **dict(zip(TYPES, hits.float().mean(0).tolist(), strict=True))}


def rate(step: int, progress: float) -> float:
    """Learning-rate factor: linear warm-up, constant, linear fall."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, (1.0 - progress) / FALL)


def groups(model: nn.Module, stage: str) -> list[dict]:
    """Parameters with their share of the learning rate: less for an image side that can see."""
    image, words = [], []
    for name, parameter in model.named_parameters():
        (words if "language_model" in name else image).append(parameter)
    share = IMAGE_SHARE if stage == "joint" else 1.0
    return [{"params": image, "share": share}, {"params": words, "share": 1.0}]


def save(model: nn.Module, folder: Path, history: dict) -> None:
    state = model.state_dict()
    del state["lm_head.weight"]  # tied to the embedding
    save_file(state, folder / "model.safetensors")
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")


def restore(model: nn.Module, folder: Path) -> dict:
    """Load what `save` wrote, if anything; its history."""
    history = {"steps": 0, "scenes": 0, "exported": 0.0, "runs": []}
    if (folder / "model.safetensors").exists():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        model.tie_weights()
        history |= json.loads((folder / "history.json").read_text())
    return history


def report(folder: Path, history: dict, means: Means, score: dict[str, float]) -> None:
    figures = {key: round(value, 4) for key, value in asdict(means).items() if key != "steps"}
    line = {
        "stage": history["runs"][-1]["stage"],
        "steps": history["steps"],
        "seconds": history["runs"][-1]["seconds"],
        **figures,
        "validation": {key: round(value, 4) for key, value in score.items()},
    }
    history["runs"][-1] |= {**figures, "validation": line["validation"]}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def train(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = cached(args.runs / "scenes", "train", args.scenes)
    held_out = cached(args.runs / "scenes", "validation", 2 * HELD_OUT)
    held_out = {field: array[:HELD_OUT] for field, array in held_out.items()}
    form = layout(questions_of("train", 0)).to(device)
    folder = args.runs / args.model
    folder.mkdir(parents=True, exist_ok=True)
    model = build(args.model).to(device).train()
    history = restore(model, folder)
    if args.grow_from:
        widen_decoder(AutoModelForImageTextToText.from_pretrained(args.grow_from).float(), model)
    model.get_input_embeddings().requires_grad_(not args.keep_words)
    if args.compile:
        for layer in model.model.vision_tower.encoder.layers:
            layer.compile()
    peak = args.lr or RATE[args.model]
    optimizer = torch.optim.AdamW(groups(model, args.stage), betas=(0.9, 0.98), weight_decay=0.05)
    rng = np.random.default_rng(history["steps"])
    run = {"stage": args.stage, "batch": args.batch, "lr": peak, "steps": 0, "seconds": 0}
    run |= {"restyle": args.restyle, "keep_words": args.keep_words}
    run["grown_from"] = args.grow_from.name if args.grow_from else None
    history["runs"].append(run)
    start, means = time.monotonic(), Means()
    for step in range(args.steps):
        run["seconds"] = round(time.monotonic() - start)
        progress = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * group["share"] * rate(step, progress)
        part = batch(data, rng.integers(0, args.scenes, args.batch), device)
        if args.restyle:
            part["pixels"] = restyle(part["pixels"])
        align, answer, seen = loss_of(model, part, args.stage, form)
        optimizer.zero_grad(set_to_none=True)
        (align + answer).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        means = means if step % args.every else Means()
        means.add(align.detach(), answer.detach(), seen)
        run["steps"] += 1
        history["steps"] += 1
        history["scenes"] += args.batch
        if run["steps"] % args.every == 0:
            report(folder, history, means, validate(model, held_out))
            save(model, folder, history)
    score = validate(model, held_out)
    report(folder, history, means, score)
    mean = sum(score[kind] for kind in TYPES) / len(TYPES)
    if args.out and mean > history["exported"]:
        history["exported"] = mean
        export(model, args.out)
        (args.out / "training.json").write_text(json.dumps(history, indent=1) + "\n")
    save(model, folder, history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SIZES, required=True)
    parser.add_argument("--stage", choices=("align", "answer", "joint"), required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="weights, logs and scenes")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=32, help="scenes a step")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--scenes", type=int, default=100_000, help="different training scenes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=200, help="steps between validations")
    parser.add_argument("--compile", action="store_true", help="compile the image tower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restyle", action="store_true", help="augment every batch anew")
    parser.add_argument("--grow-from", type=Path, help="start from the decoder of this model")
    parser.add_argument(
        "--keep-words", action="store_true", help="leave the word vectors as they are"
    )
    parser.add_argument("--out", type=Path, help="export the model here")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
