from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gracec.capture import capture, family_of
from gracec.data.conversations import open_train_data
from gracec.data.text import WINDOW
from gracec.errors import GracecError, GracecWarning
from gracec.recipe import Recipe
from gracec.training.calibration import SYNTHETIC_TEXT, calibration_data, synthetic_samples
from gracec.training.samples import open_samples
from tests.capture.test_generic import built, vipllava
from tests.tiny import IMAGE, WORDS, tiny_image, tiny_llava, tiny_processor
from tests.tiny_families import CONFIGS, tiny_model
from tests.tiny_families import tiny_processor as processor_of


def text_tokens(sample: Mapping[str, Tensor]) -> int:
    return int((sample["input_ids"] != IMAGE).sum())


@pytest.mark.parametrize("family", [*CONFIGS, "generic"])
def test_every_family_has_synthetic_samples(family: str) -> None:
    """Random words, noise pictures and no padding, which the traced function takes."""
    model = built(vipllava) if family == "generic" else tiny_model(family)
    adapter = family_of(model)
    samples = synthetic_samples(model, tokens=100, seed=1)
    assert sum(map(text_tokens, samples)) == 100
    for sample in samples:
        assert list(sample) == [*adapter.text, *adapter.vision]
        assert sample["input_ids"].shape[0] == 1 and sample["attention_mask"].all()
        assert (sample["input_ids"] == IMAGE).any()
        assert (sample["input_ids"] != IMAGE).sum(1) > 40  # many different words
        assert sample["input_ids"].unique().numel() > 30
        assert sample["pixel_values"].std() > 0.5
    with torch.no_grad():
        assert adapter.logits(model, samples[0]).isfinite().all()


def test_a_seed_makes_the_same_samples_and_another_one_others() -> None:
    model = tiny_llava()
    some, same, others = (synthetic_samples(model, tokens=60, seed=seed) for seed in (3, 3, 4))
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(some[0][name], same[0][name])
        assert not torch.equal(some[0][name], others[0][name])
    two = synthetic_samples(model, tokens=400)
    assert not torch.equal(two[0]["pixel_values"], two[1]["pixel_values"])


def test_samples_are_as_long_as_the_model_has_positions() -> None:
    samples = synthetic_samples(tiny_llava(max_position_embeddings=4096), tokens=3072)
    assert [text_tokens(sample) for sample in samples] == [SYNTHETIC_TEXT] * 8
    short = tiny_llava(max_position_embeddings=48)
    samples = synthetic_samples(short, tokens=100)
    assert [sample["input_ids"].shape[1] for sample in samples] == [48, 48, 48, 20]
    assert [text_tokens(sample) for sample in samples] == [32, 32, 32, 4]


def test_the_graph_takes_them() -> None:
    model = tiny_llava()
    (sample,) = synthetic_samples(model, tokens=50)
    (found,) = capture(model)(**sample)
    with torch.no_grad():
        assert torch.equal(found, family_of(model).logits(model, sample))


PLAIN = Recipe.from_dict({"name": "plain", "weights": {"decoder": {"group_size": 32}}})
WORDS_OF = ("red", "green", "blue", "yellow")


def recipe(**calibration: Any) -> Recipe:
    return Recipe.from_dict({**PLAIN.to_dict(), "calibration": calibration})


def trained(**training: Any) -> Recipe:
    return Recipe.from_dict({**PLAIN.to_dict(), "training": training})


def talk_about(picture: int, word: str = "red") -> dict[str, Any]:
    return {"image": tiny_image(picture), "question": f"what is {word} ?", "answer": word}


def opened(train_data: Any, rule: Recipe = PLAIN, eval_data: Any = None, **more: Any) -> Any:
    return calibration_data(tiny_llava(), rule, tiny_processor(), train_data, eval_data, **more)


def ids(samples: Sequence[Mapping[str, Tensor]]) -> set[tuple[int, ...]]:
    return {tuple(sample["input_ids"][0].tolist()) for sample in samples}


def pictures(samples: Sequence[Mapping[str, Tensor]]) -> set[bytes]:
    return {sample["pixel_values"].numpy().tobytes() for sample in samples}


def test_what_is_drawn_is_the_seeds_and_an_eighth_is_held_out() -> None:
    records = [talk_about(number, WORDS_OF[number % 4]) for number in range(24)]
    drawn = opened(records, recipe(samples=16)).drawn()
    assert (len(drawn.samples), len(drawn.held_out)) == (14, 2)
    assert len(pictures(drawn.samples) | pictures(drawn.held_out)) == 16
    for sample in (*drawn.samples, *drawn.held_out):
        assert sample["input_ids"].shape[0] == 1 and sample["attention_mask"].all()
    again = opened(records, recipe(samples=16)).drawn()
    assert all(
        torch.equal(one["pixel_values"], other["pixel_values"])
        for one, other in zip(drawn.samples, again.samples, strict=True)
    )
    other = opened(records, recipe(samples=16, seed=1)).drawn()
    assert pictures(other.samples) != pictures(drawn.samples)
    # In the order of the data, without replacement, and all of it if there is no more.
    every = opened(records).drawn()
    order = [sample["pixel_values"].numpy().tobytes() for sample in every.samples]
    given = [
        one["pixel_values"].numpy().tobytes()
        for one in map(opened(records).inputs, range(24))
        if one["pixel_values"].numpy().tobytes() in order
    ]
    assert order == given and len(every.held_out) == 3


def test_the_drawing_ends_before_there_are_too_many_tokens() -> None:
    data = opened([talk_about(number) for number in range(9)])
    each = data.inputs(0)["input_ids"].numel()
    for tokens, count in ((16, 1), (2 * each - 1, 1), (2 * each, 2), (3 * each + 1, 3)):
        drawn = opened([talk_about(n) for n in range(9)], recipe(tokens=tokens)).drawn()
        assert len(drawn.samples) + len(drawn.held_out) == count
    assert opened([talk_about(0)]).drawn().held_out == ()
    assert len(opened([talk_about(0), talk_about(1)]).drawn().held_out) == 1


def test_no_picture_is_on_both_sides() -> None:
    records = [talk_about(number // 4, WORDS_OF[number % 4]) for number in range(32)]
    for seed in range(4):
        drawn = opened(records, recipe(seed=seed)).drawn()
        assert len(drawn.held_out) == 4
        assert not pictures(drawn.samples) & pictures(drawn.held_out)
    same = [talk_about(0, word) for word in WORDS_OF]
    drawn = opened(same).drawn()  # of one picture, each question is something else
    assert len(drawn.held_out) == 1 and not ids(drawn.samples) & ids(drawn.held_out)


def test_what_is_held_out_is_not_calibrated_on() -> None:
    records = [talk_about(number) for number in range(8)]
    held = [{**talk_about(number, "green"), "question": "how ?"} for number in (1, 5)]
    data = opened(records, eval_data=held)
    assert len(data) == 6
    drawn = data.drawn()
    assert not pictures([*drawn.samples, *drawn.held_out]) & pictures(
        [opened(records).inputs(number) for number in (1, 5)]
    )
    with pytest.raises(GracecError, match="everything in train_data is in eval_data as well"):
        opened(records, eval_data=records)
    both = opened(records, trained(), eval_data=records)
    assert len(both) == 8
    assert both.notes[0] == "everything in train_data is in eval_data as well"


def test_a_recipe_without_labels_calibrates_on_what_it_trains_on() -> None:
    rule = trained(labels="all", held_out=0.25, seed=3)
    texts = [{"text": "there is a small red circle in the image . " * 60} for _ in range(4)]
    data = opened(texts, rule)
    one, held_out = open_samples(texts, None, rule.training, data.collate)
    assert data.data.fingerprint == one.data.fingerprint != held_out.data.fingerprint
    asked = [{k: v for k, v in talk_about(n).items() if k != "answer"} for n in range(8)]
    assert len(opened(asked, rule)) == 6


def test_a_recipe_that_trains_calibrates_on_what_it_trains_on() -> None:
    records = [talk_about(number) for number in range(8)]
    rule = trained(held_out=0.25, seed=3)
    data = opened(records, rule)
    train, _ = open_train_data(records).split(0.25, 3)
    assert len(data) == len(train) == 6
    assert {data.data.pictures(number) for number in range(6)} == {
        train.pictures(number) for number in range(6)
    }
    assert len(opened(records, rule, eval_data=[talk_about(9)])) == 8
    length = data.inputs(0)["input_ids"].shape[1]
    short = opened(records, trained(max_length=length - 1))
    assert short.inputs(0)["input_ids"].shape == (1, length - 1)
    with pytest.raises(GracecError, match="plain text has no answers to learn"):
        opened([{"text": "a red circle"}], rule)
    with pytest.warns(GracecWarning, match="1 of 3 samples are broken"):
        assert len(opened([*records[:2], {"question": "why ?"}], trained(held_out=0.5))) == 1


def test_questions_without_answers_and_plain_text_calibrate() -> None:
    asked = {"image": tiny_image(0), "question": "what is red ?"}
    data = opened([asked, talk_about(0), {"question": "why ?"}])
    question, answered, text = (data.inputs(number) for number in range(3))
    assert torch.equal(question["pixel_values"], answered["pixel_values"])
    assert question["input_ids"].shape[1] < answered["input_ids"].shape[1]
    assert list(text) == ["input_ids", "attention_mask"]
    words = opened([{"text": " ".join(WORDS * 20)}])
    drawn = words.drawn()
    length = tiny_llava().config.text_config.max_position_embeddings
    assert length < WINDOW
    assert {sample["input_ids"].shape for sample in drawn.samples} == {(1, length)}
    assert [list(sample) for sample in drawn.held_out] == [["input_ids", "attention_mask"]]
    assert len(drawn.samples) == len(words) - 1


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_takes_text(family: str) -> None:
    model, processor = tiny_model(family), processor_of(family)
    data = calibration_data(model, PLAIN, processor, [{"text": " ".join(WORDS * 20)}])
    sample = data.inputs(0)
    assert sample is not None and list(sample) == list(family_of(model).text)
    assert sample["input_ids"].shape == (1, 256) and sample["attention_mask"].all()


def test_activations_are_observed_on_evenly_spaced_samples() -> None:
    records = [talk_about(number) for number in range(10)]
    data = opened(records, recipe(samples=4))
    expected = [data.inputs(number) for number in (0, 2, 5, 7)]
    for found, wanted in zip(data.spaced(), expected, strict=True):
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert len(opened(records).spaced()) == 10


def test_what_cannot_be_used_is_said() -> None:
    broken = {**talk_about(1), "question": "what <image> is <pad> this ?"}
    data = opened([talk_about(0), broken])
    with pytest.warns(GracecWarning, match="control token"):
        drawn = data.drawn()
    assert len(drawn.samples) == 1 and drawn.held_out == ()
    assert ["'<pad>', a control token" in note for note in data.notes] == [True]
    with pytest.warns(GracecWarning), pytest.raises(GracecError, match="no sample can be used"):
        opened([broken]).drawn()
    with pytest.warns(GracecWarning), pytest.raises(GracecError, match="no sample can be used"):
        opened([broken]).spaced()
    with pytest.raises(GracecError, match="calibration needs the model's processor"):
        calibration_data(tiny_llava(), PLAIN, None, [talk_about(0)])
    with pytest.raises(GracecError, match="training data cannot be a bool"):
        opened(True)
