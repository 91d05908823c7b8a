"""Draw the pictures of objective.md, and write the figures that it quotes.

    python docs/objective_plots.py      rewrites docs/objective/*.svg and the tables of objective.md

All but the table of memory comes from `gracec.objective` and synthetic inputs with fixed seeds: how
the terms behave, not how a model does. Equal code gives equal files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gracec.objective import (
    Controller,
    DualAscentController,
    EpochLagrangianController,
    cka,
    confidence_gate,
)

PAGE = Path(__file__).resolve().parent / "objective.md"
PICTURES = PAGE.parent / "objective"
BENCHMARK = PAGE.parent.parent / "benchmarks/results/head_and_loss.json"
BLUE, ORANGE, PURPLE, GREEN, QUIET = "#1f7a8c", "#b8741a", "#6a4c9c", "#2e8b57", "#888888"

VOCABULARIES = (32, 1024, 151936)
TOKENS, WIDTH = 196, 64
STEPS, EPOCHS, CAPACITY = 1000, 5, 0.9
START, END = 36.0, 2.0
"""The published fall of L_GDKD; its shape and length here are an assumption."""


@dataclass(frozen=True)
class Run:
    """What a controller does on a given loss."""

    betas: list[float]
    saturated: list[bool]


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gates(vocabulary: int) -> tuple[list[float], list[float]]:
    """Entropy in nats and gate of one random teacher, from flat to peaked."""
    base = random(vocabulary, seed=0)
    logits = torch.stack([scale * base for scale in torch.logspace(-1, 1.3, 12).tolist()])
    p = logits.softmax(1)
    return torch.special.entr(p).sum(1).tolist(), confidence_gate(logits).tolist()


def similarity(x: Tensor, y: Tensor) -> float:
    """CKA of one image."""
    return cka(x[None], y[None])[0].item()


def uncentred(x: Tensor, y: Tensor) -> float:
    """What CKA would be without the centring."""
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    gram_x, gram_y = x @ x.T, y @ y.T
    return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))


def cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine of each token with its counterpart."""
    return torch.cosine_similarity(x, y).mean().item()


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Every pair of features turned by the same angle."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b = x[:, ::2], x[:, 1::2]
    return torch.stack([c * a - s * b, s * a + c * b], 2).flatten(1)


def falling_loss() -> list[float]:
    """From START to END at a constant rate."""
    return [START * (END / START) ** (k / (STEPS - 1)) for k in range(STEPS)]


def controllers() -> dict[str, Controller]:
    """Both rules; the first with both published sets of values."""
    return {
        "dual ascent, τ 0.35": DualAscentController(0.35, 0.0015, 1.0, 0.1, 5.0),
        "dual ascent, τ 3.0": DualAscentController(),
        "dual ascent, τ auto": DualAscentController("auto", steps=STEPS),
        "epoch Lagrangian": EpochLagrangianController(),
    }


def follow(controller: Controller) -> Run:
    """The controller on the falling loss, with EPOCHS epochs of codes of the same entropy."""
    betas, saturated = [], []
    for step, loss in enumerate(falling_loss(), 1):
        beta = controller.update(loss)
        if step % (STEPS // EPOCHS) == 0:
            beta = controller.end_epoch(CAPACITY)
        betas.append(beta)
        saturated.append(controller.saturated)
    return Run(betas, saturated)


def draw_gate(axes: list[Axes]) -> None:
    for vocabulary, colour in zip(VOCABULARIES, (BLUE, ORANGE, PURPLE), strict=True):
        entropy, gate = gates(vocabulary)
        label = f"V = {vocabulary:,}"
        axes[0].plot(entropy, gate, "o-", color=colour, markersize=3, label=label)
        share = [value / math.log(vocabulary) for value in entropy]
        axes[1].plot(share, gate, "o", color=colour, markersize=4, label=label)
    curve = torch.linspace(0, 1, 50).tolist()
    axes[1].plot(curve, [math.exp(-x) for x in curve], color=QUIET, zorder=0)
    axes[0].set(xlabel="entropy of the teacher, nats", ylabel="gate", ylim=(0.3, 1.05))
    axes[1].set(xlabel="entropy over ln V", ylim=(0.3, 1.05))
    axes[0].legend(frameon=False)


def draw_cka(axes: list[Axes]) -> None:
    teacher = random(TOKENS, WIDTH, seed=0)
    noise, other = random(TOKENS, WIDTH, seed=1), random(TOKENS, WIDTH, seed=2)
    offset = random(1, WIDTH, seed=3)
    angles = torch.linspace(0, 180, 25).tolist()
    levels = torch.linspace(0, 4, 25).tolist()
    turned = [rotated(teacher, angle) for angle in angles]
    noisy = [teacher + level * noise for level in levels]
    pairs = [(teacher + level * offset, other + level * offset) for level in levels]
    for panel, x, students in ((axes[0], angles, turned), (axes[1], levels, noisy)):
        panel.plot(x, [similarity(s, teacher) for s in students], color=BLUE, label="CKA")
        panel.plot(x, [cosine(s, teacher) for s in students], color=ORANGE, label="mean cosine")
    axes[2].plot(levels, [similarity(x, y) for x, y in pairs], color=BLUE, label="CKA")
    axes[2].plot(
        levels, [uncentred(x, y) for x, y in pairs], color=PURPLE, label="without centring"
    )
    axes[0].set(xlabel="rotation of the student, degrees", ylabel="similarity", ylim=(-1.05, 1.05))
    axes[1].set(xlabel="noise on the student", ylim=(-0.05, 1.05))
    axes[2].set(xlabel="offset shared by unrelated tokens", ylim=(-0.05, 1.05))
    for panel in axes:
        panel.legend(frameon=False)


def draw_beta(axes: list[Axes]) -> None:
    steps = range(1, STEPS + 1)
    axes[0].plot(steps, falling_loss(), color=QUIET)
    axes[0].set(xlabel="optimizer step", ylabel="L_GDKD, nats", yscale="log")
    axes[0].set_yticks([2, 5, 10, 20, 36], ["2", "5", "10", "20", "36"])
    axes[0].minorticks_off()
    for (name, controller), colour in zip(
        controllers().items(), (ORANGE, PURPLE, GREEN, BLUE), strict=True
    ):
        betas = follow(controller).betas
        axes[1].plot(steps, betas, color=colour)
        axes[1].text(STEPS * 1.03, betas[-1], name, color=colour, va="center", fontsize=8)
    axes[1].set(xlabel="optimizer step", ylabel="β, or λ", ylim=(0, 6))
    axes[1].set_yscale("symlog", linthresh=1, linscale=2)
    axes[1].set_yticks([0, 0.5, 1, 5], ["0", "0.5", "1", "5"])


def picture(name: str, panels: int, draw: Callable[[list[Axes]], None], folder: Path) -> None:
    """One row of panels as docs/objective/NAME.svg; text stays text, and there is no date."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gracec", "font.size": 9}):
        figure = Figure(figsize=(3.6 * panels, 2.9), layout="constrained")
        axes = [figure.add_subplot(1, panels, k + 1) for k in range(panels)]
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_all(folder: Path) -> None:
    """All pictures of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    picture("gate", 2, draw_gate, folder)
    picture("cka", 3, draw_cka, folder)
    picture("beta", 2, draw_beta, folder)


def gate_table() -> str:
    """The gate of a teacher that is undecided between k of V classes."""
    choices = (1, 2, 10, 1000)
    rows = ["| V | " + " | ".join(f"{k:,} equal" for k in choices) + " | all equal |"]
    rows.append("|" + " ---: |" * (len(choices) + 2))
    for vocabulary in VOCABULARIES:
        cells = []
        for count in (*choices, vocabulary):
            logits = torch.full((vocabulary,), -1e4, dtype=torch.float64)
            logits[:count] = 0
            found = f"{confidence_gate(logits).item():.3f}"
            cells.append(found if count <= vocabulary else "")
        rows.append(f"| {vocabulary:,} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def cka_table() -> str:
    """Similarities of one set of tokens and what is made of it."""
    teacher, other = random(TOKENS, WIDTH, seed=0), random(TOKENS, WIDTH, seed=2)
    noise, offset = random(TOKENS, WIDTH, seed=1), random(1, WIDTH, seed=3)
    half = torch.cat([teacher[TOKENS // 2 :], teacher[: TOKENS // 2]])
    cases = {
        "rotated by 90°": (teacher, rotated(teacher, 90)),
        "with as much noise": (teacher, teacher + noise),
        "tokens in another order": (teacher, half),
        "unrelated": (teacher, other),
        "unrelated, ten times more features than tokens": (
            random(TOKENS, 10 * TOKENS, seed=4),
            random(TOKENS, 10 * TOKENS, seed=5),
        ),
        "unrelated, with a large common offset": (teacher + 4 * offset, other + 4 * offset),
    }
    rows = ["| student | CKA | without centring | mean cosine |", "| --- | ---: | ---: | ---: |"]
    for name, (x, y) in cases.items():
        rows.append(
            f"| {name} | {similarity(x, y):.2f} | {uncentred(x, y):.2f} | {cosine(x, y):.2f} |"
        )
    return "\n".join(rows).replace("-0.00", "0.00")


def beta_table() -> str:
    """What each controller does on the falling loss."""
    rows = [
        "| controller | first | lowest | highest | last | first saturated at step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, controller in controllers().items():
        run = follow(controller)
        first = run.saturated.index(True) + 1 if any(run.saturated) else "never"
        betas = (run.betas[0], min(run.betas), max(run.betas), run.betas[-1])
        rows.append(f"| {name} | {' | '.join(f'{b:.2f}' for b in betas)} | {first} |")
    return "\n".join(rows)


def memory_table() -> str:
    """The rows of benchmarks/results/head_and_loss.json."""
    result = json.loads(BENCHMARK.read_text(encoding="utf-8"))
    rows = [
        "| form | vocabulary | positions | one copy of the logits | peak memory | seconds of the "
        "processor, median (range) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        form = f"chunks of {row['chunk']}" if row["chunk"] else row["variant"]
        median, low, high = (f"{row[f'seconds_{kind}']:.3g}" for kind in ("median", "min", "max"))
        rows.append(
            f"| {form} | {row['vocabulary']:,} | {row['positions']:,} | "
            f"{row['logits_mib']:,} MiB | {row['peak_mib']:,} MiB | {median} ({low} to {high}) |"
        )
    first, environment = result["rows"][0], result["environment"]
    threads = first["threads"]
    rows += [
        "",
        f"d = {first['width']}, float32, "
        f"{threads} thread{'s' if threads > 1 else ''}; `{result['command']}`. "
        f"Load when it started: {environment['load_at_start']} on {environment['cores']} cores.",
    ]
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "gate": gate_table,
    "cka": cka_table,
    "beta": beta_table,
    "memory": memory_table,
}


def render(page: str) -> str:
    """The page with its tables as they are computed now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    draw_all(PICTURES)
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
