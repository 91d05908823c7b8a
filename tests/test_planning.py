"""The plan of a training against the training itself, and against what runs it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import gracec
from gracec.errors import GracecError
from gracec.inspection import inspect_model
from gracec.models.hub import find_description
from gracec.planning import Pair, Planner, Rehearsals
from gracec.recipe import Recipe, Training
from gracec.report.training_plan import Setting, TrainingPlan
from gracec.training.planned_samples import Stated
from tests.tiny import IMAGE_TOKENS, tiny_config, tiny_image, tiny_llava
from tests.tiny_families import CONFIGS
from tests.tiny_families import tiny_processor as processor_of

RECIPE = Recipe.from_dict(
    {
        "name": "planned",
        "weights": {"decoder": {"bits": 4, "group_size": 32}},
        "training": {"batch_size": 8, "micro_batch_size": 2, "steps": 2},
    }
)
TEXT = Stated(picture=(64, 64), text=20, answer=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations alone: a student, and a wider teacher."""
    path = tmp_path_factory.mktemp("planned")
    tiny_config().save_pretrained(path / "student")
    tiny_config(hidden_size=96, num_attention_heads=4).save_pretrained(path / "teacher")
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """Captured once for all plans."""
    rule = RECIPE.training
    assert rule is not None
    rule = rule.model_copy(update={"precision": "float32"})
    student, teacher = (find_description(folder / name) for name in ("student", "teacher"))
    return Pair.read(student, teacher, RECIPE, rule, "cpu", None)


@pytest.fixture(scope="module")
def plan_for(pair: Pair) -> Callable[..., TrainingPlan]:
    samples = pair.samples(None, TEXT)
    rates = {"float32": 0.1, "bfloat16": 0.2}
    rehearsals = Rehearsals(pair, samples)

    def plan(devices: int = 1, memory: int = 10**9) -> TrainingPlan:
        return Planner(pair, samples, devices, memory, rates, 10.0, rehearsals).plan()

    return plan


def test_a_configuration_is_enough(plan_for: Callable[..., TrainingPlan]) -> None:
    found = plan_for()
    student, teacher = (tiny_llava(**more) for more in ({}, {"hidden_size": 96}))
    assert found.parameters == student.num_parameters()
    assert found.tokens == IMAGE_TOKENS + 20
    assert (found.visual, found.supervised) == (IMAGE_TOKENS, 8)
    assert found.wanted.bytes["original"] == 4 * student.num_parameters()
    assert found.wanted.bytes["teacher"] == 4 * teacher.num_parameters()
    assert found.wanted.setting == Setting(2, "float32")
    assert json.loads(json.dumps(found.to_dict()))["wanted"]["peak"] == found.wanted.peak


def test_what_fits_is_the_fastest_first_and_less_memory_takes_less(
    plan_for: Callable[..., TrainingPlan],
) -> None:
    found = plan_for()
    seconds = [one.seconds for one in found.settings]
    assert len(found.settings) == 4 and seconds == sorted(seconds)
    assert {one.setting.micro_batch_size for one in found.settings} == {8}
    for one in found.settings:
        written = yaml.safe_load(one.setting.lines())["training"]
        assert Training.model_validate(written).micro_batch_size == one.setting.micro_batch_size
    peaks = [one.peak for one in found.settings]
    memory = (min(peaks) + max(peaks)) // 2
    small = plan_for(memory=memory)
    assert small.settings and all(one.peak <= memory for one in small.settings)
    assert min(one.setting.micro_batch_size for one in small.settings) < 8
    none = plan_for(memory=1000)
    assert not none.settings and none.refused is not None and not none.fits
    assert any("nothing fits 1 kB" in line for line in none.verdict())


def test_of_what_is_sharded_each_device_has_its_share(
    plan_for: Callable[..., TrainingPlan],
) -> None:
    found = plan_for(devices=4)
    settings = {
        (one.setting.precision, one.setting.checkpointing, one.setting.strategy): one
        for one in found.settings
    }
    one, four = (settings["float32", False, strategy] for strategy in ("ddp", "sharded"))
    for kind in ("masters", "moments", "w_hat", "teacher"):
        assert four.bytes[kind] == one.bytes[kind] // 4
    assert four.bytes["gathered"] > 0 and "gathered" not in one.bytes
    assert four.setting.lines() == (
        "training: {micro_batch_size: 2, precision: float32, strategy: sharded}"
    )
    assert found.wanted.setting.strategy == "ddp"  # as it fits
    assert plan_for(devices=4, memory=one.peak - 1).wanted.setting.strategy == "sharded"
    assert found.wanted.teacher_seconds == pytest.approx(plan_for().wanted.teacher_seconds / 4)


def test_inspect_shows_the_training_and_counts_what_the_processor_makes(tmp_path: Path) -> None:
    CONFIGS["qwen2_vl"]().save_pretrained(tmp_path)
    processor = processor_of("qwen2_vl")
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    processor.save_pretrained(tmp_path)
    rule = {"distillation": {"kind": "none", "omega": 0}}
    found = inspect_model(
        tmp_path, Recipe.from_dict({**RECIPE.to_dict(), "training": rule}), text=20
    )
    picture = processor.image_processor(images=[tiny_image(size=(640, 480))], return_tensors="pt")
    visual = int(picture["image_grid_thw"].prod()) // 4
    assert visual > 6  # as many as the configuration alone makes up
    assert found.training is not None
    assert found.training.visual == visual
    assert found.training.tokens == found.memory.tokens > visual + 20
    assert json.loads(json.dumps(found.to_dict()))["training"]["tokens"] == found.memory.tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "w4a16-ptq"}, "recipe w4a16-ptq: it does not train; try w4a16"),
        ({"devices": 9}, "devices: 9 devices share 8 samples of a step"),
        ({"memory_per_device": "much"}, "memory_per_device: 'much' is no memory; say 80GB"),
        ({"device_tflops": -1.0}, "device_tflops: -1.0 is no rate"),
        ({"device": "tpu"}, "device: no plan for 'tpu'; use cuda or cpu"),
        ({"data": [{"conversations": []}]}, "no processor"),
    ],
)
def test_what_does_not_fit_is_one_line(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(GracecError) as caught:
        gracec.plan(folder / "student", **{"recipe": RECIPE, "stated": TEXT, **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
