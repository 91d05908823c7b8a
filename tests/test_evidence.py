"""The arithmetic of the evidence table, and that the page says what the results say."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "evidence"


@pytest.fixture(scope="module", autouse=True)
def beside_the_scripts() -> None:
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_without_clusters_and_seeds_it_is_the_binomial_error() -> None:
    compare = script("compare")
    hits = torch.arange(1000) % 4 == 0
    found = compare.estimate([hits], torch.arange(1000))
    assert found.value == 0.25
    assert found.error == pytest.approx(math.sqrt(0.25 * 0.75 / 1000), rel=1e-3)


def test_questions_about_one_concept_count_once_when_they_go_together() -> None:
    compare = script("compare")
    concepts = torch.arange(100).repeat_interleave(10)
    hits = concepts % 4 == 0
    found = compare.estimate([hits], concepts)
    assert found.error == pytest.approx(math.sqrt(0.25 * 0.75 / 100), rel=1e-2)


def test_seeds_that_differ_widen_the_error_and_pairing_narrows_it() -> None:
    compare = script("compare")
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(2000, generator=draw) < 0.7
    better = base | (torch.rand(2000, generator=draw) < 0.05)
    clusters = torch.arange(2000)
    paired = compare.estimate([better], clusters, [base])
    assert paired.value == pytest.approx(better.double().mean() - base.double().mean())
    assert paired.error < compare.estimate([better], clusters).error / 2
    seeds = compare.estimate([better, base], clusters, [base])
    alone = (better.double() - base.double()).mean().item()
    assert seeds.value == pytest.approx(alone / 2)
    assert seeds.error > alone / 2  # two runs, one of which shows nothing
    assert seeds.low < 0 < seeds.high
    with pytest.raises(ValueError, match="2 seeds do not pair with 3"):
        compare.estimate([better, base], clusters, [base] * 3)


def test_right_answers_survive_packing() -> None:
    run = script("run")
    for hits in (torch.rand(800, 5) < 0.5, torch.zeros(8, 5) > 0, torch.ones(4, 5) > 0):
        assert torch.equal(run.unpack(run.pack(hits)), hits)


def test_every_question_belongs_to_what_it_is_about() -> None:
    task = script("task")
    clusters = task.clusters("validation")
    assert len(clusters) == task.SCENES
    questions = task.evaluation_questions("validation", 7)
    for subject, question in zip(clusters[7], questions, strict=True):
        if question.type in ("where", "exist", "count"):
            assert subject in question.text
        if question.type == "name":
            assert subject == question.answer
    (category,) = (q for q in questions if q.type == "category")
    cell = task.CELLS.index(tuple(category.text.split()[-3:-1]))
    assert clusters[7][questions.index(category)] == task.compose("validation", 7).cells[cell].name


def test_a_redrawn_scene_looks_otherwise_and_asks_the_same() -> None:
    task = script("task")
    plain, redrawn = (task.records("train", range(3), restyled) for restyled in (False, True))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    again = task.records("train", range(1, 3), True)
    assert torch.equal(torch.rand(1), expected)  # a training draws as if nothing were redrawn
    assert [record["image"].tobytes() for record in again] == [
        record["image"].tobytes() for record in redrawn[5:]
    ]
    for before, after in zip(plain, redrawn, strict=True):
        assert before["image"].size == after["image"].size
        assert (before["question"], before["answer"]) == (after["question"], after["answer"])
    assert len({record["image"].tobytes() for record in plain}) == 3
    assert len({record["image"].tobytes() for record in redrawn}) == 15


def test_a_condition_is_a_built_in_recipe_with_what_it_varies() -> None:
    conditions = script("conditions")
    names = [condition.name for condition in conditions.conditions()]
    assert len(names) == len(set(names))
    for condition, seed in conditions.jobs():
        recipe = condition.resolved(seed)
        assert (recipe.training is None) == (condition.steps == 0)
        assert recipe.calibration.method == ("auto" if condition.calibrated else "weights")
        signed = {rule.signed for rule in recipe.weights.values() if rule is not None}
        assert signed <= {condition.calibrated}
        if recipe.training is not None:
            assert recipe.training.seed == seed
            assert recipe.training.lr == condition.training.get("lr", 1e-4)
            assert recipe.training.distillation.needs_teacher == bool(condition.teacher)


def test_the_page_says_what_the_results_say() -> None:
    page = script("page")
    assert page.render(page.Evidence()) == page.PAGE.read_text(encoding="utf-8")


def test_the_seeds_that_both_have_are_paired(tmp_path: Path) -> None:
    page, run = script("page"), script("run")
    draw = torch.Generator().manual_seed(0)
    for name, seeds in (("a", (0, 1, 2)), ("b", (0, 1)), ("student", (0,))):
        for seed in seeds:
            hits = run.pack(torch.rand(800, 5, generator=draw) < 0.5)
            answers = {"answers": dict.fromkeys(("validation", "test"), hits)}
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(answers))
    evidence = page.Evidence(tmp_path)
    assert evidence.difference("a", "student").seeds == 3
    assert evidence.difference("a", "b").seeds == 2
    assert evidence.difference("a", "c") is evidence.accuracy("c") is None
    name = evidence.accuracy("a", "name")
    assert name.value == pytest.approx(
        sum(
            run.unpack(r["answers"]["test"])[:, 0].double().mean().item()
            for r in evidence.runs["a"].found.values()
        )
        / 3
    )
