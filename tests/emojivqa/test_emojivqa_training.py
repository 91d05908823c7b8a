"""What each training stage teaches which part."""

import pytest
import torch
import train
from emojivqa.models import build
from emojivqa.packing import arrays, layout, questions_of

PROJECTOR = "model.multi_modal_projector.linear_2.weight"
DECODER = "model.language_model.layers.0.mlp.down_proj.weight"


def gradients(stage: str, *, answers_only: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build("student")
    data = arrays("train", range(2))
    part = train.batch(data, torch.arange(2).numpy(), torch.device("cpu"))
    align, answer, _ = train.loss_of(model, part, stage, layout(questions_of("train", 0)))
    (answer if answers_only else align + answer).backward()
    return {name: p.grad for name, p in model.named_parameters() if name in (PROJECTOR, DECODER)}


def test_aligning_leaves_the_decoder_alone() -> None:
    found = gradients("align", answers_only=False)
    assert found[PROJECTOR].abs().sum() > 0
    assert found[DECODER] is None


@pytest.mark.parametrize(("stage", "reaches"), [("answer", False), ("joint", True)])
def test_answers_reach_the_image_side_only_in_the_joint_stage(stage: str, reaches: bool) -> None:
    found = gradients(stage, answers_only=True)
    assert found[DECODER].abs().sum() > 0
    assert (found[PROJECTOR] is not None) == reaches


def test_joint_stage_is_gentler_with_the_image_side() -> None:
    model = build("student")
    for stage, share in (("align", 1.0), ("answer", 1.0), ("joint", train.IMAGE_SHARE)):
        image, words = train.groups(model, stage)
        assert (image["share"], words["share"]) == (share, 1.0)
        assert len(image["params"]) + len(words["params"]) == len(list(model.parameters()))


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    assert train.rate(0, 0.0) == pytest.approx(1 / train.WARM_UP)
    assert train.rate(train.WARM_UP, 0.4) == 1.0
    assert train.rate(10_000, 0.85) == pytest.approx(0.5)
    assert train.rate(10_000, 1.0) == 0.0
