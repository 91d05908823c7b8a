"""Time and memory of an optimizer step: plain fine-tuning, QAT here and by torchao, and GRACE.

    python benchmarks/qat_step.py        writes benchmarks/results/qat_step.json

All rows take the same step of the same random LLaVA on the same batch, in float32: forward,
backward, clip, AdamW, on the decoder, the head and the projector. Each variant is a process of its
own that stays up; in every round each takes its turn while the others are stopped. A ratio is the
median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import forget_peak, peak_mib, random_llava, resident_mib, write_result
from torch import nn
from transformers import LlavaForConditionalGeneration

VARIANTS = {
    "fine-tuning, eager": ("plain", False),
    "fine-tuning, compiled": ("plain", True),
    "QAT, eager": ("qat", False),
    "QAT, compiled": ("qat", True),
    "QAT by torchao, eager": ("torchao", False),
    "GRACE, eager": ("grace", False),
    "teacher forward": ("teacher", False),
}
GROUP_SIZE = 128
BATCH = {"batch": 4, "images": 4, "text": 48}


def student() -> Any:
    """About 30 million parameters: a decoder of width 512 and 6 blocks."""
    return random_llava(
        {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
        {
            "vocab_size": 8192,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
        },
    )


def stepper(kind: str, compiled: bool) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    from gracec.capture import family_of

    model = student()
    batch = dict(family_of(model).example_batch(model, **BATCH))
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 5, -100)
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    if kind in ("plain", "torchao"):
        return plain_step(model, batch, kind == "torchao", compiled)
    return graph_step(model, batch, kind, compiled)


def plain_step(
    model: LlavaForConditionalGeneration, batch: dict[str, Any], torchao: bool, compiled: bool
) -> Callable[[], None]:
    """The Hugging Face model with its own loss; with torchao's fake-quantizers in the decoder."""
    if torchao:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weights = IntxFakeQuantizeConfig(torch.int4, group_size=GROUP_SIZE, is_symmetric=True)
        quantize_(model.model.language_model, QATConfig(weight_config=weights, step="prepare"))
    model.model.vision_tower.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-5, fused=True)  # as transformers does
    forward: Any = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()

    return step


def graph_step(
    model: LlavaForConditionalGeneration, batch: dict[str, Any], kind: str, compiled: bool
) -> Callable[[], None]:
    """A step of gracec's training loop."""
    from gracec.capture import capture
    from gracec.passes import parse_pipeline, run_passes
    from gracec.recipe import Training
    from gracec.training.learner import Learner
    from gracec.training.loader import one_by_one
    from gracec.training.loop import Run
    from gracec.training.micro_batch import MicroBatch

    taps = "select-supervised,return-head"
    taps = taps if kind == "qat" else f"insert-taps,{taps}"
    fake = "plan-quantization,insert-fake-quant{candidates=4}"

    def learner(passes: str, of: LlavaForConditionalGeneration) -> Learner:
        return Learner(run_passes(capture(of), parse_pipeline(passes)).program, of)

    if kind == "teacher":
        teacher = learner(f"analyze-modality,{taps}", model)
        inputs = teacher.inputs(MicroBatch.read(model, batch))

        def forward() -> None:
            with torch.no_grad():
                teacher.program(**inputs)

        return forward
    pupil = learner(f"analyze-modality,{fake},{taps}", model)
    distils = kind == "grace"
    taught = learner(f"analyze-modality,{taps}", student()) if distils else None
    off = {"kind": "none", "omega": 0}
    rule = Training.model_validate(
        {
            "batch_size": 1,
            "micro_batch_size": 1,
            "steps": 10**6,
            "compile": compiled,
            "distillation": {} if distils else off,
        }
    )
    run = Run(pupil, taught, one_by_one(lambda numbers: batch), 1, rule, None, None)

    def step() -> None:
        run.take_step()

    return step


def work(name: str, threads: int) -> None:
    """A process that takes a step for each line it reads, and answers with the seconds."""
    torch.set_num_threads(threads)
    step = stepper(*VARIANTS[name])
    before = resident_mib()
    forget_peak()
    for _ in range(3):
        step()
    print(json.dumps({"peak_mib": round(peak_mib()), "grown_mib": round(peak_mib() - before)}))
    sys.stdout.flush()
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also through torch.compile")
    parser.add_argument("--work", choices=VARIANTS, help="be the process of this variant")
    options = parser.parse_args()
    if options.work:
        work(options.work, options.threads)
        return
    load = os.getloadavg()[0]
    processes, facts = {}, {}
    variants = [
        name for name, (_, inductor) in VARIANTS.items() if options.compiled or not inductor
    ]
    for name in variants:
        command = [sys.executable, __file__, f"--work={name}", f"--threads={options.threads}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen(command, **pipes)
        facts[name] = json.loads(processes[name].stdout.readline())
        processes[name].send_signal(signal.SIGSTOP)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, process in processes.items():
            process.send_signal(signal.SIGCONT)
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name].append(float(process.stdout.readline()))
            process.send_signal(signal.SIGSTOP)
    for process in processes.values():
        process.kill()
    base = seconds["fine-tuning, eager"]
    rows = []
    for name, found in seconds.items():
        ratios = sorted(a / b for a, b in zip(found, base, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        rows.append(
            {
                "variant": name,
                "seconds_median": round(statistics.median(found), 3),
                "ratio_to_fine-tuning": round(statistics.median(ratios), 2),
                "middle_half": f"{low:.2f} to {high:.2f}",
                **facts[name],
            }
        )
    what = f"an optimizer step, INT4 g{GROUP_SIZE}, random LLaVA, batch of {BATCH['batch']}"
    arguments = "--compiled" if options.compiled else ""
    write_result("qat_step", what, rows, arguments=arguments, load=load)


if __name__ == "__main__":
    main()
