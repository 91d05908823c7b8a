"""Tokens of a plan are those that the processor makes."""

from pathlib import Path

import pytest

from gracec.data.collate import Collator
from gracec.errors import GracecError
from gracec.models.skeleton import model_without_weights
from gracec.recipe import Training
from gracec.training.planned_samples import (
    LOOKED_AT,
    Stated,
    samples_of_data,
    sizes,
    stated_samples,
)
from gracec.training.samples import open_samples
from tests.tiny import tiny_image
from tests.tiny_families import CONFIGS, tiny_processor


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize(("family", "picture"), [("llava", (64, 48)), ("qwen2_vl", (640, 480))])
def test_a_stated_picture_is_as_many_tokens_as_the_processor_makes(
    tmp_path: Path, family: str, picture: tuple[int, int], with_processor: bool
) -> None:
    config = CONFIGS[family]()
    if with_processor:
        tiny_processor(family).save_pretrained(tmp_path)
    elif family == "qwen2_vl":
        config.vision_config.patch_size = 14
    config.save_pretrained(tmp_path)
    model = model_without_weights(tmp_path)
    found = stated_samples(model, tmp_path, Stated(2, picture, 30, 10))
    own = {
        ("llava", True): 16,  # 32 px in patches of 8
        ("llava", False): 16,
        ("qwen2_vl", True): 6,  # at most 48 x 48 px
        ("qwen2_vl", False): 23 * 17,  # 640 x 480 in squares of 28 px, as transformers has it
    }[family, with_processor]
    for rows in (1, 3):
        batch = found.longest(rows)
        assert sizes(model, batch, everywhere=False) == (2 * own * rows, 10 * rows)
        assert batch["input_ids"].shape == (rows, found.lengths[0])
    words = found.lengths[0] - 2 * own - 30
    assert words > 0 if with_processor else words == 0  # what the chat template writes
    assert ("by the processor" in found.source) == with_processor


def test_some_of_the_data_go_through_the_processor(tmp_path: Path) -> None:
    CONFIGS["llava"]().save_pretrained(tmp_path)
    model, processor = model_without_weights(tmp_path), tiny_processor("llava")
    records = [
        {
            "image": tiny_image(number),
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is this ?"},
                {"from": "gpt", "value": " ".join(["red"] * (1 + number % 7))},
            ],
        }
        for number in range(40)
    ]
    rule = Training()
    samples = open_samples(records, None, rule, Collator(processor, model))[0]
    found = samples_of_data(samples, 2)
    assert len(found.lengths) == LOOKED_AT and found.count == len(samples) == 36
    longest = found.longest(2)
    assert longest["input_ids"].shape == (2, max(found.lengths))
    assert sizes(model, longest, everywhere=False) == (32, 2 * (1 + 7))  # and the end of an answer
    assert found.padded(1) == pytest.approx(1)
    assert 1 < found.padded(4) < max(found.lengths) / found.mean
    assert abs(found.typical["input_ids"].shape[1] - found.mean) < 1


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ((1, "640", 8, 8), "picture: '640' is no size; write 640x480"),
        ((1, "99999x99999", 8, 8), "picture: no picture is 99999 x 99999 pixels"),
    ],
)
def test_a_size_that_is_none_is_refused(stated: tuple[int, str, int, int], said: str) -> None:
    with pytest.raises(GracecError, match=said):
        Stated.of(*stated)
