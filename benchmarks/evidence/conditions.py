"""What is compared: every training of the evidence table, as data.

A condition is a built-in recipe with the learning rates of a small model and with what is being
varied. It is run once for each seed; a seed decides the training scenes, their order and the part
of them that is held out. All begin with positive scales from the weights alone, but for those that
are calibrated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gracec import Recipe

SMALL_MODEL = {
    "batch_size": 16,
    "micro_batch_size": 16,
    "lr": 1e-4,
    "scale_lr": 1e-3,
    "evaluate_every": 100,
    "checkpoint_every": 1000,
}
"""Of every condition; chosen on the validation split."""
PLAIN_KL = {"kind": "kl", "gate": False, "omega": 0.0, "controller": "fixed", "beta": 1.0}


def both(bits: int) -> dict[str, dict[str, Any]]:
    """Weights of decoder and projector in so many bits."""
    return {part: {"bits": bits, "group_size": 128} for part in ("decoder", "projector")}


STRESS = both(2)
"""Where post-training quantization loses more than three points."""
LAST = {"evaluate_every": 100, "keep": "last"}
NO_TRAINING = "w4a16-ptq"
ALL_SCENES = 2000
CALIBRATION_SCENES = 30
"""Of which 128 of 150 questions are drawn."""


@dataclass(frozen=True)
class Condition:
    """One row of a table.

    Attributes:
        part: of the page.
        recipe: name of a built-in recipe.
        teacher: "teacher", "self" for a frozen copy of the original, or "" for none.
        scenes: to train on, five questions each; 0 for none.
        steps: optimizer steps.
        weights: instead of the recipe's.
        distillation, training: fields that differ from the recipe's.
        restyled: every question has a picture of its own, redrawn in another style.
        calibrated: scales may be negative and are weighed by what they multiply; with scenes, codes
            are corrected, and the seed draws what on.
    """

    part: str
    name: str
    recipe: str
    teacher: str = ""
    scenes: int = 0
    steps: int = 0
    weights: dict[str, Any] | None = None
    distillation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    restyled: bool = False
    calibrated: bool = False

    @property
    def choose_on_validation(self) -> bool:
        """With all the data the best state is chosen on validation questions, with little data on
        a part of the same little data, which is all that a user has then."""
        return self.scenes == ALL_SCENES

    def resolved(self, seed: int) -> Recipe:
        """The recipe of one run."""
        fields = Recipe.load(self.recipe).to_dict()
        fields["name"] = self.name
        fields["calibration"] = {"seed": seed} if self.calibrated else {"method": "weights"}
        if self.weights is not None:
            fields["weights"] = self.weights
        fields["weights"] = {
            part: rule and {**rule, "signed": self.calibrated}
            for part, rule in fields["weights"].items()
        }
        if fields["training"] is not None:
            own = {"steps": self.steps, "seed": seed, **self.training}
            distillation = {**fields["training"]["distillation"], **self.distillation}
            fields["training"] |= {**SMALL_MODEL, **own, "distillation": distillation}
        return Recipe.from_dict(fields)


def conditions() -> list[Condition]:
    """All of them, the most important first."""
    parts = (_all_data, _long, _stress, _calibrated, _little_data, _ablations, _groups, _remedies)
    return [condition for part in parts for condition in part()]


def jobs() -> Iterator[tuple[Condition, int]]:
    """Every run: part after part, and in each of them seed after seed."""
    for part in dict.fromkeys(condition.part for condition in conditions()):
        members = [condition for condition in conditions() if condition.part == part]
        for seed in sorted({seed for member in members for seed in member.seeds}):
            yield from ((member, seed) for member in members if seed in member.seeds)


def _all_data() -> Iterator[Condition]:
    yield Condition("all", "w4a16-ptq", NO_TRAINING, seeds=(0,))
    training = {"scenes": ALL_SCENES, "steps": 200}
    yield Condition("all", "w4a16", "w4a16", "teacher", **training)
    yield Condition("all", "w4a16-qat", "w4a16-qat", **training)
    yield Condition("all", "bf16-grace", "bf16-grace", "teacher", **training)
    yield Condition("all", "bf16-sft", "bf16-sft", **training)
    yield Condition("all", "w4a16-kl", "w4a16", "teacher", **training, distillation=PLAIN_KL)


def _long() -> Iterator[Condition]:
    """The same with five times the steps."""
    training: dict[str, Any] = {"scenes": ALL_SCENES, "steps": 1000}
    yield Condition("long", "w4a16-1000", "w4a16", "teacher", **training)
    yield Condition("long", "w4a16-qat-1000", "w4a16-qat", **training)
    yield Condition("long", "w2-grace-1000", "w4a16", "teacher", **training, weights=STRESS)
    yield Condition("long", "w2-qat-1000", "w4a16-qat", **training, weights=STRESS)
    training |= {"weights": STRESS, "distillation": PLAIN_KL}
    yield Condition("long", "w2-kl-1000", "w4a16", "teacher", **training)


def _stress() -> Iterator[Condition]:
    for bits, name in ((4, "w4p-ptq"), (3, "w3-ptq"), (2, "w2-ptq")):
        yield Condition("stress", name, NO_TRAINING, weights=both(bits), seeds=(0,))
    decoder = {"decoder": {"bits": 2, "group_size": 128}}
    yield Condition("stress", "w2d-ptq", NO_TRAINING, weights=decoder, seeds=(0,))
    training: dict[str, Any] = {"scenes": ALL_SCENES, "steps": 200, "weights": STRESS}
    yield Condition("stress", "w2-grace", "w4a16", "teacher", **training)
    yield Condition("stress", "w2-qat", "w4a16-qat", **training)
    yield Condition("stress", "w2-kl", "w4a16", "teacher", **training, distillation=PLAIN_KL)
    yield Condition("stress", "w2d-grace", "w4a16", "teacher", **training | {"weights": decoder})
    training |= {"weights": both(3)}
    yield Condition("stress", "w3-grace", "w4a16", "teacher", **training)
    yield Condition("stress", "w3-qat", "w4a16-qat", **training)


def _calibrated() -> Iterator[Condition]:
    """Without training on a few questions, or on none; and trained from there."""
    for bits in (4, 3, 2):
        given: dict[str, Any] = {"weights": both(bits), "calibrated": True}
        yield Condition("calibrated", f"w{bits}-no-data", NO_TRAINING, **given)
        given |= {"scenes": CALIBRATION_SCENES}
        yield Condition("calibrated", f"w{bits}-calibrated", NO_TRAINING, **given)
        given |= {"weights": {"decoder": {"bits": bits, "group_size": 128}}}
        yield Condition("calibrated", f"w{bits}d-calibrated", NO_TRAINING, **given)
    for bits in (3, 2):
        given = {"weights": both(bits), "calibrated": True, "scenes": CALIBRATION_SCENES}
        yield Condition("calibrated", f"w{bits}-scales", "w4a16-scales", "self", steps=120, **given)
    given = {"scenes": ALL_SCENES, "steps": 200, "weights": STRESS, "calibrated": True}
    given["seeds"] = (0, 1)
    yield Condition("calibrated", "w2-qat-calibrated", "w4a16-qat", **given)
    yield Condition("calibrated", "w2-grace-calibrated", "w4a16", "teacher", **given)


def _little_data() -> Iterator[Condition]:
    training: dict[str, Any] = {
        "steps": 100,
        "training": {"evaluate_every": 25},
        "weights": STRESS,
    }
    for scenes in (100, 300, 1000):
        stress = {**training, "scenes": scenes}
        yield Condition("little", f"w2-{scenes}-qat", "w4a16-qat", **stress)
        yield Condition("little", f"w2-{scenes}-self", "w4a16", "self", **stress)
        yield Condition("little", f"w2-{scenes}-teacher", "w4a16", "teacher", **stress)
    training |= {"distillation": PLAIN_KL}
    for teacher in ("self", "teacher"):
        yield Condition("little", f"w2-100-{teacher}-kl", "w4a16", teacher, 100, **training)
    last: dict[str, Any] = {"steps": 100, "training": LAST}
    yield Condition("last", "w4-100-qat", "w4a16-qat", scenes=100, **last)
    yield Condition("last", "w4-100-self", "w4a16", "self", 100, **last)


def _ablations() -> Iterator[Condition]:
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "no-gate": {"gate": False},
        "no-decoupling": {"kind": "kl"},
        "no-rcka": {"omega": 0.0},
        "fixed-beta": {"controller": "fixed", "beta": 0.5},
        "epoch-rule": {"controller": "epoch-lagrangian", "eta": 0.1},
        "published-tau": {"tau": 3.0},
    }
    training: dict[str, Any] = {
        "scenes": 100,
        "steps": 100,
        "weights": STRESS,
        "seeds": (0, 1),
        "training": LAST,
    }
    for name, change in changes.items():
        yield Condition(
            "ablations", f"w2-{name}", "w4a16", "teacher", **training, distillation=change
        )
    # A scale is about a tenth here, so that this rate moves it as the other moves its logarithm.
    training |= {
        "weights": {part: {**rule, "parametrization": "lsq"} for part, rule in STRESS.items()},
        "training": {**LAST, "scale_lr": 1e-4},
    }
    yield Condition("ablations", "w2-lsq", "w4a16", "teacher", **training)


def _groups() -> Iterator[Condition]:
    for size in (32, 64):
        weights = {"decoder": {"bits": 4, "group_size": size}}
        yield Condition("groups", f"g{size}-ptq", NO_TRAINING, weights=weights, seeds=(0,))
        yield Condition("groups", f"g{size}-grace", "w4a16", "teacher", ALL_SCENES, 200, weights)


def _remedies() -> Iterator[Condition]:
    """What might let more of the teacher through; looked at on the validation split."""
    changes: dict[str, dict[str, Any]] = {
        "rate-3e-4": {"training": {"lr": 3e-4}},
        "tower": {"training": {"lr": 3e-5, "frozen": []}},
        "beta-2": {"distillation": {"controller": "fixed", "beta": 2.0}},
        "teacher-alone": {"training": {"cross_entropy": 0.0}},
        "restyled": {"restyled": True},
        "restyled-long": {"restyled": True, "steps": 1000},
        **{
            f"restyled-tower-{rate}": {
                "restyled": True,
                "training": {"lr": float(rate), "frozen": []},
            }
            for rate in ("1e-4", "3e-4", "1e-3")
        },
        "restyled-tower-long": {
            "restyled": True,
            "steps": 1000,
            "training": {"lr": 3e-5, "frozen": []},
        },
    }
    for name, change in changes.items():
        fields: dict[str, Any] = {"scenes": ALL_SCENES, "steps": 200, "seeds": (0,), **change}
        yield Condition("remedies", f"try-{name}", "w4a16", "teacher", **fields)
