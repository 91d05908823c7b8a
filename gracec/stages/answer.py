"""answer: the teacher answers the questions of the data, where the recipe asks for that."""

from __future__ import annotations

from dataclasses import replace

from gracec.capture import capture
from gracec.data.sources import open_source
from gracec.errors import GracecError
from gracec.journal import Journal
from gracec.request import Request
from gracec.stages.prepare import Prepared, accept, plan
from gracec.stages.source import Source
from gracec.stages.train import teacher_of, teacher_shape
from gracec.training.ranks import join_ranks
from gracec.training.teacher import check_teacher
from gracec.training.teacher_answers import teacher_answers


def answer(source: Source, request: Request, journal: Journal) -> Request:
    """The request with data that has the teacher's answers.

    Raises:
        GracecError: if there is no processor, the teacher does not fit, or the data cannot be read.
    """
    rule, processor = request.training, source.processor
    assert rule is not None
    if processor is None:
        raise GracecError("training needs the model's processor", fix="pass processor=")
    join_ranks(source.model.device)
    _accept(source, request)
    check_teacher(source.model, teacher_shape(source, request))
    found = teacher_answers(
        open_source(request.train_data),
        teacher_of(source, request),
        processor,
        rule,
        strict=request.strict,
        directory=request.training_dir,
        progress=request.progress,
    )
    one = found.summary
    said = [f"the teacher gave {one['answers']} answers, the longest of {one['longest']} tokens"]
    if one["replaced"]:
        said.append(f"the answers of {one['replaced']} conversations in the data were replaced")
    if one["cut"]:
        said.append(
            f"{one['cut']} were cut at {one['limit']} tokens: their ends are not learned; "
            "training.max_new_tokens allows more"
        )
    said += [f"such as {shown['answer']!r} to {shown['question']!r}" for shown in one["examples"]]
    journal.note("answers", *said)
    return replace(request, train_data=found)


def _accept(source: Source, request: Request) -> None:
    """Refuse what nothing can hold before hours of answers."""
    planned = plan(capture(source.model), request.recipe, strict=request.strict)
    accept(Prepared(source, source.model, planned.program), request)
