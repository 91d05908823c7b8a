"""What a model computes by itself."""

import pytest
import torch
from torch import Tensor

from gracec.capture.eager import eager_logits
from gracec.errors import GracecError
from tests.tiny import tiny_llava


def test_a_model_is_left_in_the_mode_that_it_was_in(batch: dict[str, Tensor]) -> None:
    model = tiny_llava()
    expected = eager_logits(model, batch)
    model.train()
    model.model.vision_tower.eval()
    model.model.vision_tower.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert torch.equal(eager_logits(model, batch), expected)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert learning and learning == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_model_that_cannot_run_is_named_in_one_line(batch: dict[str, Tensor]) -> None:
    model = tiny_llava()
    model.model.vision_tower.embeddings.position_ids += 1000
    with pytest.raises(GracecError, match=r"embedding.*: the model itself cannot run") as error:
        eager_logits(model, batch)
    assert "\n" not in str(error.value)
