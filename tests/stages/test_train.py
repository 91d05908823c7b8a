"""train refuses what does not fit before anything is learnt, and keeps what was said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from gracec.journal import Journal, Note
from gracec.passes import return_head
from gracec.request import Request
from gracec.stages import train as stage
from gracec.stages.prepare import Prepared
from gracec.stages.source import load_source
from gracec.stages.train import train
from tests.tiny import tiny_image, tiny_llava, tiny_processor

After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
RECORDS = [
    {"image": tiny_image(number), "question": "what color is this ?", "answer": word}
    for number, word in enumerate(("red", "green", "blue", "yellow"))
]
ALONE = {"kind": "none", "omega": 0}


def recipe(**distillation: Any) -> gracec.Recipe:
    training = {"steps": 1, "batch_size": 2, "held_out": 0.5, "distillation": distillation}
    fields = {"name": "test", "weights": {"decoder": {}}, "training": training}
    return gracec.Recipe.from_dict(fields)


@pytest.fixture
def trained(
    llava: LlavaForConditionalGeneration,
    captured: Program,
    after: After,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """trained(...): the journal of a training that reads its data and learns nothing."""

    kept: dict[str, int | None] = {"step": 0}

    def read(student: Any, teacher: Any, read: Any, size: int, held_out: Any, *_: Any, **__: Any):
        list(read([range(size)])), list(held_out)
        if teacher is not None:
            teacher.make()
        return SimpleNamespace(notes=("kept step 0",), to_dict=lambda: {"best_step": kept["step"]})

    monkeypatch.setattr(stage, "train_learner", read)
    monkeypatch.setattr(stage, "capture", lambda teacher: captured)
    monkeypatch.setattr(stage, "blocks_equal_hidden_states", lambda program, teacher: 1)

    def run(
        processor: Any = None,
        journal: Journal | None = None,
        best: int | None = 0,
        **options: Any,
    ) -> Journal:
        kept["step"] = best
        fields = {"recipe": recipe(), "train_data": RECORDS, "progress": False, **options}
        fields["processor"] = processor or tiny_processor()
        request, journal = Request.checked(llava, **fields), journal or Journal()
        source = load_source(llava, request, journal)
        train(Prepared(source, source.model, after(FAKE)), request, journal)
        return journal

    return run


def test_what_was_said_is_in_the_journal(trained: Callable[..., Journal]) -> None:
    broken = {**RECORDS[0], "question": "what <image> is <pad> this ?"}
    with pytest.warns(gracec.errors.GracecWarning, match="control token"):
        journal = trained(recipe=recipe(**ALONE), train_data=[*RECORDS, broken])
    problem, curve = journal.notes
    assert problem.source == "training" and "'<pad>', a control token" in problem.text
    assert curve == Note("training", "kept step 0")
    assert journal.training == {"best_step": 0}


def test_logits_that_have_to_be_whole_are_noted_and_strictly_refused(
    trained: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(return_head, "_found", lambda program: "aten.softmax.int follows the head")
    notes = [note.text for note in trained().notes]
    said = "logits are computed as a whole: aten.softmax.int follows the head"
    assert f"student: {said}" in notes and f"teacher: {said}" in notes
    with pytest.raises(GracecError, match="return-head: aten.softmax.int follows the head"):
        trained(strict=True)


@pytest.mark.parametrize(
    ("learns", "best_step", "kept"),
    [("all", None, True), ("all", 0, False), ("scales", 0, True), ("scales", 1, False)],
)
def test_output_errors_are_those_of_the_codes_that_were_kept(
    trained: Callable[..., Journal], learns: str, best_step: int | None, kept: bool
) -> None:
    alone = recipe(**ALONE)
    rule = alone.training.model_copy(update={"learns": learns})
    journal = Journal(output_errors={"a": (0.3, 0.2, 0.1)}, codes={"a": "corrected"})
    trained(recipe=alone.model_copy(update={"training": rule}), journal=journal, best=best_step)
    assert bool(journal.output_errors) is bool(journal.codes) is kept


def test_a_teacher_that_does_not_fit_is_refused(trained: Callable[..., Journal]) -> None:
    trained(teacher=tiny_llava(seed=1))
    with pytest.raises(GracecError, match="the image token is 4 for the student and 7"):
        trained(teacher=tiny_llava(image_token_index=7))
    with pytest.raises(GracecError, match="teacher: it has 96 rows for a vocabulary of 128 ids"):
        trained(teacher=tiny_llava(vocab_size=96))


def test_several_processes_that_compile_hold_everything_and_say_so(
    trained: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(**fields: Any) -> dict[str, Any]:
        alone = recipe(**ALONE)
        training = alone.training.model_copy(update={"compile": True, **fields})
        return {"recipe": alone.model_copy(update={"training": training})}

    def said(journal: Journal) -> list[str]:
        return [note.text for note in journal.notes if "trains by DDP" in note.text]

    assert not said(trained(**options()))
    monkeypatch.setattr(stage, "_ranks", lambda: 2)
    assert said(trained(**options()))
    assert not said(trained(**options(strategy="ddp"), strict=True))
    with pytest.raises(GracecError, match="training.strategy: compile: true trains by DDP"):
        trained(**options(), strict=True)


def test_a_teacher_whose_blocks_are_others_is_refused(
    trained: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is that of another model, so what its blocks return is too."""
    monkeypatch.setattr(stage, "blocks_equal_hidden_states", blocks_equal_hidden_states)
    with pytest.raises(GateError, match="decoder block 0 is not the hidden state"):
        trained(teacher=tiny_llava(seed=1))


def test_a_teacher_with_other_tokens_is_refused(
    trained: Callable[..., Journal], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(teacher=saved)
    monkeypatch.delattr(stage, "load_model")  # before any of its weights is read
    words = tiny_processor()
    words.tokenizer.add_tokens(["w999"])
    with pytest.raises(GracecError, match="different tokenizers: 'w999' differs"):
        trained(teacher=saved, processor=words)
