"""What a teacher has to have in common with its student."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.errors import GracecError


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that says something else with the same tokens. Its widths may differ.

    Raises:
        GracecError: naming what differs.
    """
    models = {"student": student, "teacher": teacher}
    batches = {name: family_of(m).example_batch(m, batch=1, images=1) for name, m in models.items()}
    configs = {name: m.config for name, m in models.items()}
    facts = {
        "the family": {name: c.model_type for name, c in configs.items()},
        "the vocabulary": {name: c.get_text_config().vocab_size for name, c in configs.items()},
        "the image token": {
            name: getattr(c, "image_token_id", None) for name, c in configs.items()
        },
        "the number of visual tokens": {
            name: family_of(m).image_tokens(m, batches["student"])[0] for name, m in models.items()
        },
        "the size of an image": {
            name: tuple(batch["pixel_values"].shape[1:]) for name, batch in batches.items()
        },
    }
    for what, found in facts.items():
        if found["student"] != found["teacher"]:
            raise GracecError(
                f"{what} is {found['student']} for the student and {found['teacher']} for the "
                "teacher",
                where="teacher",
                fix="choose a teacher of the same family and tokenizer",
            )
    # Each batch is read once, for both.
    one, other = (family_of(m).read(m, batches["student"]) for m in models.values())
    differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    if differing:
        raise GracecError(
            f"student and teacher do not get the same {differing[0]} from one batch",
            where="teacher",
            fix="choose a teacher whose configuration treats pictures and text alike",
        )


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse processors that give other ids to the same text.

    Raises:
        GracecError: with the first token that differs.
    """
    vocabularies = [processor.tokenizer.get_vocab() for processor in (student, teacher)]
    differences = dict(vocabularies[0].items() ^ vocabularies[1].items())
    if differences:
        raise GracecError(
            f"student and teacher have different tokenizers: {min(differences)!r} differs",
            where="teacher",
            fix="choose a teacher with the student's tokenizer",
        )
