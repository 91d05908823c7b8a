"""Every stage takes a value and returns a new one: what it was given is the same afterwards."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gracec import ir
from gracec.frozen import Frozen
from gracec.ir.program import Program
from gracec.journal import Journal
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.stages.examine import examine_compiled, examine_original
from gracec.stages.freeze import freeze
from gracec.stages.lower import lower
from gracec.stages.prepare import Prepared, accept, prepare
from gracec.stages.publish import read_artifact, write_artifact
from gracec.stages.source import Source, load_source
from gracec.stages.train import train
from tests.tiny import tiny_image, tiny_llava, tiny_processor

RECORDS = [
    {"image": tiny_image(number), "question": "what color is this ?", "answer": word}
    for number, word in enumerate(("red", "green", "blue", "yellow"))
]
TRAINING = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "held_out": 0.25, "lr": 1e-3}
TRAINED = Recipe.from_dict(
    {"name": "trained", "weights": {"decoder": {"group_size": 32}}, "training": TRAINING}
)


def hash_of(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_of_model(model: Any) -> tuple[str, str, bool]:
    """Of its tensors and its configuration, and whether it trains."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return hash_of(iter(tensors)), model.config.to_json_string(), model.training


def hash_of_program(program: Program) -> tuple[str, str]:
    """Of its tensors, and its text with all annotations."""
    named = ((target, program.tensor(target)) for target in sorted(program.fqns))
    return hash_of(named), ir.format(program)


def hash_of_frozen(frozen: Frozen) -> tuple[Any, ...]:
    """Of codes, scales, everything else and the skeleton."""
    named = [(name, tensor) for name, tensor in sorted(frozen.others.items())]
    for fqn, weight in sorted(frozen.weights.items()):
        named += [(f"{fqn}.codes", weight.stored), (f"{fqn}.scales", weight.scales)]
    return hash_of(iter(named)), hash_of_model(frozen.skeleton)


def hash_of_prepared(prepared: Prepared) -> tuple[Any, ...]:
    models = hash_of_model(prepared.model), hash_of_model(prepared.source.model)
    return *models, hash_of_program(prepared.program)


def unchanged(given: Any, hashed: Callable[[Any], Any], work: Callable[[], Any]) -> Any:
    """What a stage returns, which has to leave what it was given as it is."""
    before = hashed(given)
    result = work()
    assert hashed(given) == before
    return result


def request_for(model: Any, recipe: str | Recipe, **options: Any) -> Request:
    return Request.checked(model, recipe, processor=tiny_processor(), progress=False, **options)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_stage_changes_what_it_is_given(tied: bool, tmp_path: Path) -> None:
    model = tiny_llava(tie=tied)
    head = {"weights": {part: {"group_size": 32} for part in ("decoder", "head")}}
    request = request_for(model, Recipe.from_dict({"name": "head", **head}))
    journal = Journal()
    source = unchanged(model, hash_of_model, lambda: load_source(model, request, journal))
    unchanged(source.model, hash_of_model, lambda: examine_original(source, request))
    prepared = unchanged(source.model, hash_of_model, lambda: prepare(source, request, journal))
    unchanged(prepared, hash_of_prepared, lambda: accept(prepared, request))
    frozen = unchanged(prepared, hash_of_prepared, lambda: freeze(prepared, request, journal))
    runtime = unchanged(frozen, hash_of_frozen, lambda: lower(frozen, request.target, journal))
    exam = examine_original(source, request)
    unchanged(frozen, hash_of_frozen, lambda: examine_compiled(exam, runtime, None, request))
    unchanged(
        frozen,
        hash_of_frozen,
        lambda: write_artifact(
            tmp_path / "out", frozen, request.formats, recipe=request.recipe, journal=journal
        ),
    )
    again, _ = read_artifact(tmp_path / "out")
    assert hash_of_frozen(again)[0] == hash_of_frozen(frozen)[0]
    unchanged(again, hash_of_frozen, lambda: lower(again, request.target, Journal()))
    assert hash_of_model(model) == hash_of_model(tiny_llava(tie=tied))


def test_training_leaves_the_prepared_model_as_it_is(llava: LlavaForConditionalGeneration) -> None:
    request = request_for(llava, TRAINED, train_data=RECORDS)
    journal = Journal()
    source = load_source(llava, request, journal)
    prepared = prepare(source, request, journal)
    trained = unchanged(prepared, hash_of_prepared, lambda: train(prepared, request, journal))
    assert journal.training["best_step"] > 0
    # The model is that of the program, and both have learned.
    assert hash_of_program(trained.program) != hash_of_program(prepared.program)
    assert hash_of_model(trained.model) != hash_of_model(prepared.model)
    for target, (fqn, *_) in trained.program.fqns.items():
        if fqn in dict(trained.model.named_parameters()):
            assert trained.program.tensor(target) is trained.model.get_parameter(fqn)


def test_a_request_is_not_changed_by_a_compilation(llava: LlavaForConditionalGeneration) -> None:
    request = request_for(llava, "w4a16-ptq", strict=False)
    copy = replace(request)
    journal = Journal(list(request.notes))
    source = load_source(llava, request, journal)
    freeze(prepare(source, request, journal), request, journal)
    assert request == copy and request.notes == ()


def test_a_source_shares_the_memory_of_the_callers_model(
    llava: LlavaForConditionalGeneration,
) -> None:
    source = load_source(llava, request_for(llava, "w4a16-ptq"), Journal())
    assert isinstance(source, Source)
    for one, other in zip(llava.parameters(), source.model.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr() and one is not other
