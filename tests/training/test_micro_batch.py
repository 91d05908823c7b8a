"""A micro-batch: read once, and what student, teacher, objective and scores take from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gracec.capture import family_of
from gracec.errors import GracecError
from gracec.objective import supervised_positions
from gracec.training.micro_batch import MicroBatch
from tests.tiny import IMAGE, IMAGE_TOKENS, tiny_llava


@pytest.fixture
def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two prompts with a picture each; the last two tokens of the first are an answer."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -2:] = batch["input_ids"][0, -2:]
    labels[1, -1:] = batch["input_ids"][1, -1:]
    return {**batch, "labels": labels}


def test_what_a_micro_batch_holds(
    llava: LlavaForConditionalGeneration, labelled: dict[str, Tensor]
) -> None:
    micro = MicroBatch.read(llava, labelled, images=True)
    index, labels = supervised_positions(labelled["labels"])
    assert torch.equal(micro.index, index) and torch.equal(micro.labels, labels)
    assert micro.shape == labelled["labels"].shape
    assert micro.rows.tolist() == [0, 0, 1]
    found, sizes = family_of(llava).image_index(llava, labelled)
    targets = micro.targets
    assert targets.labels is micro.labels
    assert targets.image_index is not None and torch.equal(targets.image_index, found)
    assert targets.image_sizes == tuple(sizes) == (IMAGE_TOKENS, IMAGE_TOKENS)
    without = MicroBatch.read(llava, labelled).targets
    assert without.image_index is None and without.image_sizes is None


def test_inputs_keep_the_dtype_they_came_in(labelled: dict[str, Tensor]) -> None:
    """So that a wide teacher sees no pixels that were rounded for a narrow student."""
    narrow, wide = tiny_llava(dtype=torch.bfloat16), tiny_llava()
    family, micro = family_of(wide), MicroBatch.read(narrow, labelled)
    for model in (narrow, wide):
        prepared, found = family.prepare(model, labelled), family.cast(model, micro.inputs)
        assert list(found) == list(prepared)
        assert all(torch.equal(found[name], prepared[name]) for name in prepared)
        assert found["pixel_values"].dtype == model.dtype


def test_a_batch_that_the_graph_does_not_take_is_refused(
    llava: LlavaForConditionalGeneration, labelled: dict[str, Tensor]
) -> None:
    with pytest.raises(GracecError, match="places for 32 visual tokens, the 1 images"):
        MicroBatch.read(llava, {**labelled, "pixel_values": labelled["pixel_values"][:1]})


@pytest.mark.parametrize("padded_on", ["left", "right"])
def test_every_token_of_text_may_be_a_target(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor], padded_on: str
) -> None:
    """Not padding, not the places of a picture, and not what only padding comes before."""
    if padded_on == "right":
        lengths = batch["attention_mask"].sum(1).tolist()
        for name in ("input_ids", "attention_mask"):
            rows = [row.roll(n - len(row)) for row, n in zip(batch[name], lengths, strict=True)]
            batch = {**batch, name: torch.stack(rows)}
    micro = MicroBatch.read(llava, batch, everywhere=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = [
        (row * ids.shape[1] + at, int(ids[row, at + 1]))
        for row in range(len(ids))
        for at in range(ids.shape[1] - 1)
        if mask[row, at] and mask[row, at + 1] and ids[row, at + 1] != IMAGE
    ]
    assert list(zip(micro.index.tolist(), micro.labels.tolist(), strict=True)) == expected
    assert micro.shape == ids.shape and len(expected) > 10
