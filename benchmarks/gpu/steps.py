"""Optimizer steps of gracec's own loop on that LLaVA: fine-tuning, QAT and GRACE, eager and
compiled; and the teacher's forward, which a step of GRACE contains."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from machine import Machine
from sections import Figures, Item
from serving import llava, prompt

from gracec.capture import capture
from gracec.ir.program import Program
from gracec.models.surgery import own_weights
from gracec.passes import parse_pipeline, run_passes
from gracec.recipe import Training
from gracec.training.learner import Learner
from gracec.training.loader import one_by_one
from gracec.training.loop import Run
from gracec.training.micro_batch import MicroBatch
from gracec.training.setup import precision_of

FAKE = "plan-quantization{recipe=w4a16-ptq},insert-fake-quant{candidates=4}"
TAPS = "insert-taps,select-supervised"
OFF = {"kind": "none", "omega": 0}
WARM, TIMED = 2, 5


class Steps:
    """One student and one teacher for all kinds of steps, each of which goes on with the weights of
    the one before."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def items(self) -> list[Item]:
        kinds = ("fine-tuning", "QAT", "GRACE")
        return [
            ("capture", self.capture),
            ("teacher's forward", self.teach),
            *((kind, partial(self.step, kind, compiled=False)) for kind in kinds),
            *(
                (f"{kind}, compiled", partial(self.step, kind, compiled=True))
                for kind in ("GRACE",) * self.machine.small or ("GRACE", "fine-tuning", "QAT")
            ),
        ]

    def capture(self) -> Figures:
        """Student and teacher as graphs, and a batch with every token of text as a target."""
        teacher = llava(self.machine)
        student = own_weights(teacher)
        self.pupil, self.taught = (
            Learner(run_passes(capture(model), parse_pipeline("analyze-modality")).program, model)
            for model in (student, teacher)
        )
        batch = prompt(self.machine, student, 2 if self.machine.small else 4, text=128)
        batch = {name: tensor.cpu() for name, tensor in batch.items()}  # as a collator makes it
        image = student.config.image_token_id
        ignored = (batch["input_ids"] == image) | (batch["attention_mask"] == 0)
        self.batch = batch | {"labels": batch["input_ids"].masked_fill(ignored, -100)}
        rule = Training()
        return {
            "tokens": list(batch["input_ids"].shape),
            "targets": int((~ignored).sum()),
            "matmuls": str(precision_of(rule, self.machine.device)).removeprefix("torch."),
        }

    def teach(self) -> Figures:
        """A forward without gradients, in the teacher's own dtype."""
        teacher = self._with(self.taught, TAPS)
        inputs = teacher.inputs(MicroBatch.read(teacher.model, self.batch))

        def forward() -> None:
            with torch.no_grad():
                teacher.program(**inputs)

        return self._timed(forward)

    def step(self, kind: str, *, compiled: bool) -> Figures:
        """Forward, backward, clip and AdamW, by the training loop."""
        torch._dynamo.reset()
        distils = kind == "GRACE"
        passes = f"{FAKE},{TAPS}" if kind != "fine-tuning" else TAPS
        rule = Training.model_validate(
            {
                "batch_size": 1,
                "micro_batch_size": 1,
                "steps": 10**6,
                "compile": compiled,
                "distillation": {} if distils else OFF,
            }
        )
        run = Run(
            self._with(self.pupil, passes),
            self._with(self.taught, TAPS) if distils else None,
            one_by_one(lambda numbers: self.batch),
            1,
            rule,
            None,
            None,
        )
        return self._timed(run.take_step)

    def _timed(self, run: Any) -> Figures:
        warm = self.machine.seconds(lambda: [run() for _ in range(WARM)])
        self.machine.forget()
        found = [self.machine.seconds(run) for _ in range(2 if self.machine.small else TIMED)]
        return {
            "ms": round(1e3 * statistics.median(found), 1),
            "least_ms": round(1e3 * min(found), 1),
            "warm_up_seconds": round(warm, 1),
            **self.machine.memory(),
        }

    @staticmethod
    def _with(learner: Learner, passes: str) -> Learner:
        program: Program = run_passes(learner.program, parse_pipeline(passes)).program
        return Learner(program, learner.model)
