"""Peak memory and time of head, cross-entropy and L_GDKD: in chunks, and straightforward.

    python benchmarks/head_and_loss.py        writes benchmarks/results/head_and_loss.json

Both compute the same loss and the same gradients of hidden states and head. The straightforward
form makes the logits of all positions and leaves the rest to autograd. Every row is a process of
its own, and its seconds are those of the processor. Peak memory is what its resident set grows by,
beyond inputs and libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import forget_peak, in_a_process, peak_mib, resident_mib, write_result
from torch import Tensor

from gracec.objective import CrossEntropy, Gdkd, LazyLogits, position_terms
from gracec.objective.head import CHUNK_BYTES

QWEN2_VL, SMALL = 151936, 8192
ROWS = [
    ("straightforward", QWEN2_VL, 1024, 2),
    ("chunked", QWEN2_VL, 1024, 2),
    ("chunked", QWEN2_VL, 4096, 1),
    ("straightforward", SMALL, 1024, 9),
    ("chunked", SMALL, 1024, 9),
]
"""Variant, vocabulary, positions, timed repeats. One more run comes before them."""
TOLERANCE = 1e-4
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def straightforward(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    """L_CE + L_GDKD at T = 2, α = 1, β = 4 from whole logits."""
    student = hidden @ head.T
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_head.T
        log_p = teacher.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        gate = torch.exp(-entropy / torch.tensor(float(len(head))).log())
    y = labels.unsqueeze(1)
    target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, y, True)
    p_s, p_t = ((x / 2).log_softmax(1).gather(1, y).squeeze(1).exp() for x in (student, teacher))
    tckd = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    rest_s, rest_t = ((x / 2).masked_fill(target, -1e30).log_softmax(1) for x in (student, teacher))
    nckd = (rest_t.exp() * (rest_t - rest_s)).sum(1)
    gdkd = (gate * 4 * (tckd + 4 * nckd)).sum() / gate.sum()
    return F.cross_entropy(student, labels) + gdkd


def chunked(chunk_size: int | None) -> Loss:
    """The same by `gracec.objective`."""

    def loss(
        hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
    ) -> Tensor:
        ce, gdkd = position_terms(
            [CrossEntropy(), Gdkd()],
            LazyLogits(hidden, head),
            LazyLogits(teacher_hidden, teacher_head),
            labels,
            ignore_index=-100,
            chunk_size=chunk_size,
        )
        return ce.mean() + gdkd.mean()

    return loss


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, options.width, generator=generator)

    hidden, head = random(options.positions), random(options.vocabulary) * options.width**-0.5
    teacher_hidden = hidden + random(options.positions)
    teacher_head = head.clone()
    labels = torch.randint(options.vocabulary, (options.positions,), generator=generator)
    inputs = hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels
    lazy = options.variant == "chunked"
    chunk = options.chunk or min(options.positions, CHUNK_BYTES // (4 * options.vocabulary))
    loss_of = chunked(options.chunk) if lazy else straightforward
    forget_peak()
    before = resident_mib()
    seconds = []
    for _ in range(options.repeats + 1):
        hidden.grad = head.grad = None
        start = time.process_time()
        loss = loss_of(*inputs)
        loss.backward()
        seconds.append(time.process_time() - start)
        value = loss.item()
        del loss
    assert hidden.grad is not None
    assert head.grad is not None
    return {
        "variant": options.variant,
        "positions": options.positions,
        "vocabulary": options.vocabulary,
        "width": options.width,
        "chunk": chunk if lazy else None,
        "threads": options.threads,
        "repeats": options.repeats,
        "peak_mib": round(peak_mib() - before),
        "logits_mib": round(options.positions * options.vocabulary * 4 / 2**20),
        "seconds_median": round(statistics.median(seconds[1:]), 3),
        "seconds_min": round(min(seconds[1:]), 3),
        "seconds_max": round(max(seconds[1:]), 3),
        "loss": round(value, 5),
        "gradient_norms": [round(hidden.grad.norm().item(), 7), round(head.grad.norm().item(), 7)],
    }


def check(rows: list[dict[str, Any]]) -> None:
    """Both forms of as many positions give the same loss and gradients."""
    for a in rows:
        for b in rows:
            if (a["vocabulary"], a["positions"]) == (b["vocabulary"], b["positions"]):
                for x, y in zip(
                    [a["loss"], *a["gradient_norms"]],
                    [b["loss"], *b["gradient_norms"]],
                    strict=True,
                ):
                    assert abs(x - y) <= TOLERANCE * abs(x), (a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of the hidden states")
    parser.add_argument("--chunk", type=int, help="positions in one go; default: the objective's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=["straightforward", "chunked"], help="only this row")
    parser.add_argument("--vocabulary", type=int, default=QWEN2_VL, help="of --variant")
    parser.add_argument("--positions", type=int, default=1024, help="of --variant")
    parser.add_argument("--repeats", type=int, default=3, help="of --variant")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    load = os.getloadavg()[0]
    common = {"width": options.width, "threads": options.threads}
    common |= {"chunk": options.chunk} if options.chunk else {}
    names = ("variant", "vocabulary", "positions", "repeats")
    rows = [in_a_process(__file__, common | dict(zip(names, row, strict=True))) for row in ROWS]
    check(rows)
    what = "head, cross-entropy and L_GDKD, forward and backward, float32, processor seconds"
    write_result("head_and_loss", what, rows, load=load)


if __name__ == "__main__":
    main()
