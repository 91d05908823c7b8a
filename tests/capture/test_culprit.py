import pytest
import torch
from torch import Tensor, nn

from gracec.capture import capture
from gracec.capture.culprit import culprit
from gracec.errors import GracecError
from tests.tiny import tiny_llava


def depends_on_data(features: Tensor) -> Tensor:
    return features if features.sum() > 0 else -features


def leaves_torch(features: Tensor) -> Tensor:
    return torch.from_numpy(features.numpy() + 1)


@pytest.mark.parametrize("broken", [depends_on_data, leaves_torch])
def test_the_module_and_the_line_are_named(
    broken: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llava()
    monkeypatch.setattr(model.model.multi_modal_projector, "forward", broken)
    with pytest.raises(GracecError) as error:
        capture(model)
    line = broken.__code__.co_firstlineno + 1  # type: ignore[attr-defined]
    assert error.value.where == f"model.multi_modal_projector at {__file__}:{line}"
    assert "def forward" not in capfd.readouterr().err, "torch's dump of the graph"


def test_a_line_in_the_code_of_transformers() -> None:
    model = tiny_llava()
    layer = model.model.vision_tower.encoder.layers[0]
    layer.layer_norm1 = nn.LayerNorm(31)  # does not fit the 32 features it gets
    with pytest.raises(GracecError) as error:
        capture(model)
    where, _, source = error.value.where.partition(" at ")
    assert where == "model.vision_tower.encoder.layers.0.layer_norm1"
    assert "modeling_clip.py:" in source


def test_an_error_from_elsewhere_names_the_model() -> None:
    assert culprit(ValueError("no traceback"), tiny_llava()) == "LlavaForConditionalGeneration"
