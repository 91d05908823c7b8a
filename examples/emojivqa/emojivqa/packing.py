"""Scenes with all their questions as arrays, and many questions of one image in one sequence.

A packed sequence is the prefix `<bos> <user> <image> x 64` followed by every question in turn,
`question <assistant> answer`. A question sees the prefix and itself, and its positions restart
after the prefix, so each is computed exactly as if it stood alone behind the image. Question
types come in a fixed order and each has a fixed length, so one mask serves every scene.
"""

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .questions import TYPES, Question, evaluation_questions, training_questions
from .scenes import CELLS, SIZE, compose, render
from .tokenizer import VISUAL_TOKENS, vocabulary

ROUNDS = 3
IGNORED = -100
_CHUNK = 500


def encode(question: Question) -> tuple[list[int], list[int]]:
    """(tokens in, token expected after each), the latter `IGNORED` before the answer."""
    ids = vocabulary()
    asked = [ids[word] for word in question.text.split()] + [ids["<assistant>"]]
    answer = [ids[word] for word in question.answer.split()]
    expected = [IGNORED] * (len(asked) - 1) + answer + [ids["<eos>"]]
    return asked + answer, expected


@dataclass(frozen=True)
class Layout:
    """What all packed sequences with the same question types share (L = their length).

    positions: int64 [L], position ids; mask: bool [L, L], true where row may see column;
    answers: int64 [A], positions after which an answer token is expected;
    owner: int64 [A], the question each of those belongs to.
    """

    positions: Tensor
    mask: Tensor
    answers: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> "Layout":
        return Layout(*(t.to(device) for t in vars(self).values()))


def layout(questions: list[Question]) -> Layout:
    prefix = 2 + VISUAL_TOKENS
    block, positions = [-1] * prefix, list(range(prefix))
    answers, owner = [], []
    for number, question in enumerate(questions):
        tokens, expected = encode(question)
        known = [len(block) + i for i, target in enumerate(expected) if target != IGNORED]
        answers += known
        owner += [number] * len(known)
        positions += range(prefix, prefix + len(tokens))
        block += [number] * len(tokens)
    blocks = torch.tensor(block)
    seen = (blocks[None, :] == -1) | (blocks[None, :] == blocks[:, None])
    mask = seen & torch.ones(len(block), len(block), dtype=torch.bool).tril()
    return Layout(torch.tensor(positions), mask, torch.tensor(answers), torch.tensor(owner))


def prefix_ids() -> list[int]:
    ids = vocabulary()
    return [ids["<bos>"], ids["<user>"]] + [ids["<image>"]] * VISUAL_TOKENS


def questions_of(split: str, index: int) -> list[Question]:
    if split == "train":
        return training_questions(split, index, ROUNDS * len(TYPES))
    return evaluation_questions(split, index)


def arrays(split: str, indices: range) -> dict[str, np.ndarray]:
    """N scenes: images uint8 [N, SIZE, SIZE, 3]; cells int16 [N, 4], concept or -1;
    tokens and expected int16 [N, L - prefix]."""
    images = np.empty((len(indices), SIZE, SIZE, 3), np.uint8)
    cells = np.full((len(indices), len(CELLS)), -1, np.int16)
    tokens, expected = [], []
    for row, index in enumerate(indices):
        scene = compose(split, index)
        images[row] = render(split, index, scene)
        for cell, concept in scene.present:
            cells[row, cell] = concept.index
        pairs = [encode(question) for question in questions_of(split, index)]
        tokens.append([token for asked, _ in pairs for token in asked])
        expected.append([token for _, wanted in pairs for token in wanted])
    text = {"tokens": np.array(tokens, np.int16), "expected": np.array(expected, np.int16)}
    return {"images": images, "cells": cells, **text}


def _chunk(job: tuple[str, int, int]) -> dict[str, np.ndarray]:
    return arrays(job[0], range(job[1], job[2]))


def cached(folder: Path, split: str, total: int, workers: int = 2) -> dict[str, np.ndarray]:
    """`arrays(split, range(total))` from `folder`, made there first where it is missing."""
    fields = ("images", "cells", "tokens", "expected")
    paths = {field: folder / f"{split}-{total}-{field}.npy" for field in fields}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(split, at, min(at + _CHUNK, total)) for at in range(0, total, _CHUNK)]
        with get_context("spawn").Pool(workers) as pool:
            parts = pool.map(_chunk, jobs, chunksize=1)
        for field, path in paths.items():
            np.save(path, np.concatenate([part[field] for part in parts]))
    return {field: np.load(path, mmap_mode="r") for field, path in paths.items()}
