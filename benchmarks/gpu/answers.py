"""EmojiVQA, where it is known what is right: the shipped student compiled, trained by GRACE from
the shipped teacher, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from machine import Machine
from sections import Figures, Item

import gracec
from gracec.demo import write_questions
from gracec.evaluate import VqaReport, VqaSample, evaluate_vqa, load_samples, paired_difference
from gracec.models.loading import load_model, load_processor
from gracec.recipe import Recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emojivqa"
NEW_TOKENS = 5


class Answers:
    """The student in float32, after post-training quantization, and after GRACE."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        self.options: dict[str, Any] = {"formats": (), "progress": False}
        self.options["device"] = str(machine.device)

    def items(self) -> list[Item]:
        return [
            ("student, float32", self.student),
            ("INT4 without training", self.ptq),
            ("INT4 by GRACE", self.grace),
            ("INT4, saved and loaded", self.saved),
        ]

    def student(self) -> Figures:
        self.train, test = self.folder / "train", self.folder / "test"
        write_questions(EXAMPLE, "train", self.train, 60 if self.machine.small else 2500)
        write_questions(EXAMPLE, "test", test, 40 if self.machine.small else 2000)
        self.samples: list[VqaSample] = load_samples(test)
        self.processor = load_processor(EXAMPLE / "student")
        model = load_model(EXAMPLE / "student", torch.float32, self.machine.device)
        self.before = self._asked(model)
        return self._figures(self.before)

    def ptq(self) -> Figures:
        self.compiled = gracec.compile(EXAMPLE / "student", "w4a16-ptq", **self.options)
        return self._figures(self._asked(self.compiled))

    def grace(self) -> Figures:
        recipe = Recipe.load(EXAMPLE / "grace.yaml")
        if self.machine.small:
            fields = recipe.to_dict()
            fields["training"]["steps"] = 3
            recipe = Recipe.from_dict(fields)
        teacher: dict[str, Any] = {"teacher": EXAMPLE / "teacher", "train_data": self.train}
        trained = gracec.compile(EXAMPLE / "student", recipe, **teacher, **self.options)
        training = trained.report.training
        figures = self._figures(self._asked(trained))
        first, *_, last = (row["held_out_loss"] for row in training["held_out"])
        return figures | {"steps": training["steps"], "held_out_loss": [first, last]}

    def saved(self) -> Figures:
        """To the disk and back on the device, and on the processor.

        Raises:
            RuntimeError: if what is loaded on the device says other tokens.
        """
        place = self.folder / "artifact"
        self.compiled.save_pretrained(place, ("hf",))
        batch = self.processor(
            images=[sample.picture() for sample in self.samples[:8]],
            text=[f"<image>\n{sample.question}" for sample in self.samples[:8]],
            return_tensors="pt",
            padding=True,
        )
        tokens = [
            self._said(model, batch)
            for model in (
                self.compiled,
                gracec.load(place, "torchao", device=str(self.machine.device)),
                gracec.load(place, "torchao"),
            )
        ]
        if not torch.equal(tokens[0], tokens[1]):
            raise RuntimeError("what was loaded says other tokens than what was saved")
        same = (tokens[0] == tokens[2]).float().mean().item()
        return {"same_tokens": True, "same_tokens_on_the_cpu_percent": round(100 * same, 1)}

    def _said(self, model: Any, batch: Any) -> torch.Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        settings = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        said: torch.Tensor = model.generate(**inputs, **settings)
        return said.cpu()

    def _asked(self, model: Any) -> VqaReport:
        return evaluate_vqa(model, self.processor, self.samples, batch_size=256, blind=False)

    def _figures(self, report: VqaReport) -> Figures:
        change = paired_difference(report, self.before)
        return {
            "questions": len(self.samples),
            "right_percent": round(100 * report.overall.accuracy, 1),
            "change_points": round(100 * change.difference, 2),
            "standard_error": round(100 * change.standard_error, 2),
        }
