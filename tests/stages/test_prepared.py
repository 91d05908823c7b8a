"""What is prepared has tensors of its own where it will be trained, and says what it will be."""

from transformers import LlavaForConditionalGeneration

from gracec.journal import Equal, Journal
from gracec.recipe import Recipe
from gracec.stages.freeze import freeze
from gracec.stages.prepare import prepare
from gracec.stages.source import load_source
from tests.stages.test_purity import RECORDS, TRAINED, request_for

HEAD = Recipe.from_dict(
    {
        **TRAINED.to_dict(),
        "name": "head",
        "weights": {part: {"group_size": 32} for part in ("decoder", "head")},
    }
)


def test_a_head_that_was_tied_is_trained_apart_from_the_embedding(
    llava: LlavaForConditionalGeneration,
) -> None:
    """One memory for both would take each step of the optimizer twice."""
    request = request_for(llava, HEAD, train_data=RECORDS)
    owned = prepare(load_source(llava, request, Journal()), request, Journal()).owned()
    head, table = owned.model.get_output_embeddings(), owned.model.get_input_embeddings()
    assert head is not None
    assert head.weight.data_ptr() != table.weight.data_ptr()
    names = {fqn: target for target, (fqn, *_) in owned.program.fqns.items()}
    assert owned.program.tensor(names["lm_head.weight"]) is head.weight


def test_a_model_that_is_not_trained_is_not_copied(llava: LlavaForConditionalGeneration) -> None:
    request = request_for(llava, "w4a16-ptq")
    source = load_source(llava, request, Journal())
    prepared = prepare(source, request, Journal())
    assert prepared.model is source.model
    for one, other in zip(llava.parameters(), prepared.model.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()


def test_the_plan_says_what_freezing_gives(llava: LlavaForConditionalGeneration) -> None:
    request, journal = request_for(llava, "w4a16-ptq"), Journal()
    prepared = prepare(load_source(llava, request, journal), request, journal)
    assert journal.figures["captured_equals_eager"] == Equal(3, "batches")
    assert journal.figures["blocks_equal_hidden_states"] == Equal(1, "blocks")
    frozen = freeze(prepared, request, journal)
    planned = prepared.planned(frozen.dtype)
    assert planned.weights.keys() == frozen.weights.keys() == prepared.plan.quantized.keys()
    assert planned.others.keys() == frozen.others.keys()
    for fqn, weight in planned.weights.items():
        real = frozen.weights[fqn]
        assert (weight.spec, weight.shape) == (real.spec, real.shape)
        assert weight.scales.shape == real.scales.shape
