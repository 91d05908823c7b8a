import pytest
import torch

from gracec.errors import GracecError
from gracec.objective import gdkd_loss, next_token_labels, supervised_positions
from gracec.objective.labels import aligned
from tests.objective.reference import IGNORED, random_logits

LABELS = torch.tensor([[IGNORED, 5, IGNORED, 7], [3, IGNORED, IGNORED, 2]])


def test_a_position_is_matched_with_the_token_after_it() -> None:
    expected = [[5, IGNORED, 7, IGNORED], [IGNORED, IGNORED, 2, IGNORED]]
    assert next_token_labels(LABELS).tolist() == expected


def test_supervised_positions_are_flat_and_come_with_their_targets() -> None:
    index, targets = supervised_positions(LABELS)
    assert index.tolist() == [0, 2, 6]
    assert targets.tolist() == [5, 7, 2]


def test_all_positions_and_the_supervised_ones_give_the_same_loss() -> None:
    student, teacher = random_logits(2, 4, 9), random_logits(2, 4, 9, seed=1)
    index, targets = supervised_positions(LABELS)
    chosen = gdkd_loss(student.flatten(0, 1)[index], teacher.flatten(0, 1)[index], targets)
    torch.testing.assert_close(gdkd_loss(student, teacher, LABELS), chosen)


def test_one_axis_of_positions_is_not_shifted() -> None:
    x, targets = aligned(torch.zeros(4, 9), LABELS[0], IGNORED, "x")
    assert x.shape == (4, 9)
    assert targets is LABELS[0] or torch.equal(targets, LABELS[0])


@pytest.mark.parametrize(
    ("shape", "labels", "reason"),
    [
        ((4,), torch.zeros(4, dtype=torch.int64), "x: expected .S, ·. or .B, T, ·., got .4."),
        ((2, 4, 9), torch.zeros(2, 3, dtype=torch.int64), "does not go with labels .2, 3."),
        ((2, 4, 9), torch.zeros(8, dtype=torch.int64), "labels of these positions are .2, 4."),
        ((4, 9), torch.zeros(4), "labels are int64, these are torch.float32"),
    ],
)
def test_other_forms_are_refused(shape: tuple[int, ...], labels: torch.Tensor, reason: str) -> None:
    with pytest.raises(GracecError, match=reason):
        aligned(torch.zeros(shape), labels, IGNORED, "x")


def test_supervised_positions_refuse_labels_without_a_time_axis() -> None:
    with pytest.raises(GracecError, match="labels are .B, T., these are .4."):
        supervised_positions(LABELS[0])
