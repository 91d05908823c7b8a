"""Answers are true, and cannot be guessed from the question."""

from collections import Counter

import pytest
from emojivqa.concepts import CONCEPTS, PLURAL
from emojivqa.questions import TYPES, Question, evaluation_questions, training_questions
from emojivqa.scenes import CELLS, Scene, compose

SCENES = 800
CATEGORY = {concept.name: concept.category for concept in CONCEPTS}


def truth(scene: Scene, question: Question) -> str:
    """The answer, found from the words of the question alone."""
    words = question.text.split()
    names = [concept.name if concept else None for concept in scene.cells]
    if question.type in ("name", "category"):
        there = names[CELLS.index((words[-3], words[-2]))]
        return there if question.type == "name" else CATEGORY[there]
    if question.type == "where":
        return " ".join(CELLS[names.index(words[3])])
    if question.type == "count":
        return str(sum(PLURAL[CATEGORY[name]] == words[2] for name in names if name))
    return "yes" if words[3] in names else "no"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_answers_are_true(split: str) -> None:
    for index in range(200):
        scene = compose(split, index)
        asked = evaluation_questions(split, index) + training_questions(split, index, 15)
        for question in asked:
            assert question.answer == truth(scene, question), (index, question)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_answers_are_balanced(split: str) -> None:
    answers = {kind: Counter() for kind in TYPES}
    for index in range(SCENES):
        for question in evaluation_questions(split, index):
            answers[question.type][question.answer] += 1
    share = {kind: max(answers[kind].values()) / SCENES for kind in TYPES}
    assert sum(answers[kind].total() for kind in TYPES) == 4000
    assert share["exist"] == 0.5
    assert share["count"] == 0.2
    assert share["where"] < 0.30
    assert share["category"] < 0.20
    assert share["name"] < 0.03


def test_half_of_the_absent_things_resemble_a_present_one() -> None:
    hard = Counter()
    for index in range(1, SCENES, 2):
        scene = compose("test", index)
        word = evaluation_questions("test", index)[3].text.split()[3]
        hard[CATEGORY[word] in {concept.category for _, concept in scene.present}] += 1
    assert hard[True] > hard.total() / 2
    assert hard[False] > hard.total() / 5
