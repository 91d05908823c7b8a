from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gracec.capture import capture, family_of
from gracec.training.calibration import SYNTHETIC_TEXT, synthetic_samples
from tests.capture.test_generic import built, vipllava
from tests.tiny import IMAGE, tiny_llava
from tests.tiny_families import CONFIGS, tiny_model


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
