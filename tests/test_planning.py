"""The plan of a training against the training itself, and against what runs it."""

import gc
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gracec
from gracec.errors import GracecError
from gracec.inspection import inspect_model
from gracec.models.hub import find_description
from gracec.planning import Pair, Planner, Rates, Rehearsals
from gracec.recipe import Recipe, Training
from gracec.report.training_plan import Setting, TrainingPlan
from gracec.training.learner import LaterTeacher
from gracec.training.loop import Run
from gracec.training.planned_samples import Stated
from gracec.training.sharding import FOR_PARAMETERS, bytes_of_a_rank
from tests.tiny import IMAGE_TOKENS, tiny_config, tiny_image, tiny_llava, tiny_processor
from tests.tiny_families import CONFIGS
from tests.tiny_families import tiny_processor as processor_of
from tests.training.test_run import records

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
    rates = Rates({"float32": 0.1, "bfloat16": 0.2}, 10.0, 2.0)
    rehearsals = Rehearsals(pair, samples)

    def plan(devices: int = 1, memory: int = 10**9) -> TrainingPlan:
        return Planner(pair, samples, devices, memory, rates, rehearsals).plan()

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
    seconds = [one.seconds + one.filling_seconds for one in found.settings]
    assert len(found.settings) == 8 and seconds == sorted(seconds)
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
    plan_for: Callable[..., TrainingPlan], pair: Pair
) -> None:
    found = plan_for(devices=4)
    settings = {
        (one.setting.precision, one.setting.checkpointing, one.setting.strategy): one
        for one in found.settings
        if not one.setting.teacher_cache
    }
    one, four = (settings["float32", False, strategy] for strategy in ("ddp", "sharded"))
    for kind in ("masters", "moments", "w_hat", "teacher"):
        assert four.bytes[kind] == one.bytes[kind] // 4
    assert four.bytes["gathered"] > 0 and "gathered" not in one.bytes
    assert four.setting.lines() == (
        "training: {micro_batch_size: 2, precision: float32, strategy: sharded}"
    )
    # What "auto" is does not depend on activations, for those are not known to the training.
    memory = math.ceil(pair.bytes_of_a_rank(cached=False) / FOR_PARAMETERS)
    assert plan_for(devices=4, memory=memory + 2).wanted.setting.strategy == "ddp"
    assert plan_for(devices=4, memory=memory - 2).wanted.setting.strategy == "sharded"
    assert found.wanted.teacher_seconds == pytest.approx(plan_for().wanted.teacher_seconds / 4)


def test_what_is_computed_again_for_many_samples_at_once_takes_time(pair: Pair) -> None:
    given = pair.samples(None, TEXT)
    made = Rehearsals(pair, given)
    planner = Planner(pair, given, 1, 10**9, Rates({"float32": 1e-3}, 1e9, 1e9), made)
    setting = Setting(2, "float32")
    before, _ = planner.seconds(setting)
    one, two = (made.of(count, "float32")[1] for count in (1, 2))
    assert two.computed == pytest.approx(2 * one.computed, rel=0.02)  # in one chunk
    made.made[2, "float32"] = replace(two, backward=two.backward + two.computed)
    assert planner.seconds(setting)[0] == pytest.approx(2 * before, rel=0.01)


def test_with_a_cache_the_teacher_leaves_its_head_and_its_answers_are_on_the_disk(
    plan_for: Callable[..., TrainingPlan],
) -> None:
    found = plan_for()
    assert found.otherwise is not None and found.cache is not None
    without, cached = found.wanted, found.otherwise
    assert cached.setting == replace(without.setting, teacher_cache=True)
    assert 0 == cached.teacher_seconds < without.teacher_seconds
    assert cached.student_seconds == without.student_seconds
    assert cached.bytes["teacher"] == 4 * 128 * 96 < without.bytes["teacher"]
    assert cached.peak < without.peak
    # The input of its head at 8 positions, and the upper triangle of the relations of the picture.
    said = 4 * (8 * 96 + IMAGE_TOKENS * (IMAGE_TOKENS + 1) // 2)
    assert found.cache.sample_bytes == said and found.cache.bytes is None
    assert any("with teacher_cache: " in line for line in found.verdict())
    assert "teacher_cache: true" in cached.setting.lines()


class Enough(Exception):
    """Of the training: what follows is no part of a plan."""


class Watched:
    """What a training holds after its first step, and the most that the second one adds to it."""

    def __init__(self) -> None:
        gc.collect()
        self.before = sum(storages().values())
        self.held = self.added = 0
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_step(self, step: int, figures: dict[str, Any]) -> bool:
        if step == 1:
            for one in tensors():
                one.grad = None  # as the next step begins: the profiler sees no end of what is old
            self.held = sum(storages().values()) - self.before
            self.profile.start()
            return False
        self.profile.stop()
        events: Any = self.profile.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.added = max(itertools.accumulate(size for _, size in memory))
        raise Enough


def tensors() -> list[Tensor]:
    """All that Python knows of."""
    found = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return [one for one in found if one.device.type == "cpu"]


def storages() -> dict[int, int]:
    """Address of the memory of every tensor -> bytes."""
    held = (one.untyped_storage() for one in tensors())
    return {one.data_ptr(): one.nbytes() for one in held if one.nbytes()}


@pytest.mark.slow  # alone in its process: it counts every tensor there
@pytest.mark.parametrize("training", [{}, {"learns": "scales", "teacher_cache": "teachers"}])
def test_the_peak_is_that_of_the_training(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its tensors; and what the rule for sharding adds up, to the byte."""
    monkeypatch.chdir(tmp_path)
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    for name, layers in (("student", 2), ("teacher", 3)):
        tiny_llava(**wide, num_hidden_layers=layers).save_pretrained(tmp_path / name)
        tiny_processor().save_pretrained(tmp_path / name)
    rule = {**RECIPE.to_dict()["training"], "evaluate_every": 9, **training}
    quick = {"calibration": {"method": "weights"}, "scale_search": {"candidates": 2}}
    recipe = Recipe.from_dict({**RECIPE.to_dict(), **quick, "training": rule})
    counted: list[int] = []

    def counts(run: Run, teacher: LaterTeacher) -> bool:
        counted.append(bytes_of_a_rank(run.quantized.program, run.parameters, teacher))
        return False

    monkeypatch.setattr(Run, "_shards", counts)
    data, watched = records(20), Watched()
    options: dict[str, Any] = {"teacher": tmp_path / "teacher", "progress": False}
    with pytest.raises(Enough):
        gracec.compile(
            tmp_path / "student", recipe, train_data=data, callbacks=[watched], **options
        )
    student, teacher = (find_description(tmp_path / name) for name in ("student", "teacher"))
    assert recipe.training is not None
    float32 = recipe.training.model_copy(update={"precision": "float32"})
    pair = Pair.read(student, teacher, recipe, float32, "cpu", None)
    given = pair.samples(data, TEXT)
    planner = Planner(pair, given, 1, 10**9, Rates.of("cpu"), Rehearsals(pair, given))
    cached = bool(training)
    assert counted == [pair.bytes_of_a_rank(cached=cached)]
    setting = planner.given_setting()
    in_a_step = planner.bytes_at(setting, planner.share // setting.micro_batch_size)["micro-batch"]
    assert sum(in_a_step.values()) == pytest.approx(watched.held + watched.added, rel=0.1)
    if cached:
        assert planner.cache is not None and planner.cache.bytes is not None
        files = list(tmp_path.glob("teachers/*/*/*.safetensors"))
        kept = [one for file in files for one in safetensors.torch.load_file(file).items()]
        written = sum(tensor.nbytes for name, tensor in kept if name != "sizes")
        assert planner.cache.samples == len(files)
        assert planner.cache.bytes == pytest.approx(written, rel=0.02)


def test_student_and_teacher_are_never_whole_at_once(pair: Pair) -> None:
    samples = pair.samples(None, TEXT)
    planner = Planner(pair, samples, 8, 10**9, Rates.of("cpu"), Rehearsals(pair, samples))
    times = planner.bytes_at(Setting(1, "float32", strategy="sharded"), 1)
    student, teacher = (times[f"before the {name} is sharded"] for name in ("student", "teacher"))
    assert student.keys() == {"masters", "frozen", "original"}
    assert student["masters"] == 4 * pair.footprint.learned
    assert teacher["teacher"] == pair.teaching and teacher["original"] == pair.original
    assert teacher["masters"] == student["masters"] // 8
    assert teacher["w_hat"] == times["teacher"]["w_hat"] == 4 * pair.footprint.held // 8


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
