"""What a teacher has to have in common with its student, and over which ids it teaches.

Models of one tokenizer pad its vocabulary to different sizes: Qwen2-VL has 151,936 rows in its 2B
and 152,064 in its 7B model. Rows that no token has mean nothing, and are not compared.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.errors import GracecError
from gracec.models.devices import same_device

OTHER_TOKENIZER = "choose a teacher with the student's tokenizer"
PROBE = "In 1984 the cats' 3,141 toys weren't  red; def f(x): return x**2 Straße 你好 мир"
"""A text whose tokens depend on how a tokenizer normalises, splits and merges."""


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that says something else with the same tokens. Its widths may differ.

    Raises:
        GracecError: naming what differs.
    """
    models = {"student": student, "teacher": teacher}
    batches = {name: family_of(m).example_batch(m, batch=1, images=1) for name, m in models.items()}
    configs = {name: m.config for name, m in models.items()}
    facts: dict[str, dict[str, Any]] = {
        "the family": {name: c.model_type for name, c in configs.items()},
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
    if not same_device(student.device, teacher.device):
        raise GracecError(
            f"it is on {teacher.device}, the student on {student.device}",
            where="teacher",
            fix=f"move it: teacher.to({str(student.device)!r})",
        )
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


def taught_ids(student: PreTrainedModel, teacher: PreTrainedModel, processor: Any) -> int | None:
    """How many ids, the first ones, are learnt from a teacher; None where both have the same rows.

    These are all up to the largest of the tokenizer, with added tokens and with ids in between that
    no token has; without a processor, those that both models have a row for.

    Raises:
        GracecError: if the teacher has no row for a token of the student's.
    """
    rows, taught = vocabulary_rows(student), vocabulary_rows(teacher)
    if rows == taught:
        return None
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return min(rows, taught)
    ids: int = min(1 + max(tokenizer.get_vocab().values()), rows)
    if taught < ids:
        raise GracecError(
            f"it has {taught} rows for a vocabulary of {ids} ids",
            where="teacher",
            fix=OTHER_TOKENIZER,
        )
    return ids


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many logits a model has at a position."""
    found: int = model.config.get_text_config().vocab_size
    return found


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse processors that give other ids to the same text.

    Raises:
        GracecError: with the first token, or the text, that differs.
    """
    tokenizers = [processor.tokenizer for processor in (student, teacher)]
    one, other = (tokenizer.get_vocab() for tokenizer in tokenizers)
    differences = dict(one.items() ^ other.items())
    if differences:
        raise GracecError(
            f"student and teacher have different tokenizers: {min(differences)!r} differs",
            where="teacher",
            fix=OTHER_TOKENIZER,
        )
    # The same tokens can be merged in another order, or from a text that was normalised otherwise.
    ids = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers]
    if ids[0] != ids[1]:
        raise GracecError(
            f"student and teacher have different tokenizers: they cut {PROBE!r} otherwise",
            where="teacher",
            fix=OTHER_TOKENIZER,
        )
