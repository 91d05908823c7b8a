"""The peer's script: what it takes for quantized, and the grid that it holds the weights to."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evidence" / "peer_gptq.py"


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_gptq", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_a_grid(bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Weights [8, 4 groups] with every code of `bits` bits in each group, and their scales."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(8, 4, generator=generator) + 0.01
    codes = torch.arange(group_size).remainder(2**bits) - 2 ** (bits - 1)
    return (codes * scale[..., None]).reshape(8, -1), scale


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128])
def test_integers_times_scales_are_on_the_grid(
    peer: ModuleType, bits: int, group_size: int
) -> None:
    weight, scale = on_a_grid(bits, group_size)
    assert peer.check_grid("w", weight, scale, bits, group_size) == 2**bits
    assert peer.levels(weight, group_size) == 2**bits


def test_weights_off_the_grid_are_refused(peer: ModuleType) -> None:
    weight, scale = on_a_grid(4, 32)
    moved = weight.clone()
    moved[3, 41] *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"w: 1 of 1024 values are not integers times scales"):
        peer.check_grid("w", moved, scale, 4, 32)
    with pytest.raises(ValueError, match=r"codes from -8.0 to 7.0 for 3 bits"):
        peer.check_grid("w", weight, scale, 3, 32)
    with pytest.raises(ValueError, match=r"\(8, 4\) scales for 8 x 128 weights"):
        peer.check_grid("w", weight, scale, 4, 64)
    shuffled = weight[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    assert peer.levels(shuffled, 32) > 16


def test_names_of_the_student_are_found_in_the_model_and_back(peer: ModuleType) -> None:
    with safe_open(peer.STUDENT / "model.safetensors", "pt") as file:
        names = list(file.keys())
    inside = [peer.in_module(name) for name in names]
    assert [peer.in_file(name) for name in inside] == names
    weights = [name for name in inside if peer.LINEARS.fullmatch(name.removesuffix(".weight"))]
    assert len(weights) == peer.EXPECTED
    assert sum(1 for name in inside if peer.AWQ_CHANGES.fullmatch(name)) == 8


def test_the_calibration_set_follows_from_the_seed(peer: ModuleType, tmp_path: Path) -> None:
    lines = [f'{{"question": "{number}"}}' for number in range(20)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first = peer.chosen(tmp_path, 10, 0)
    assert first == peer.chosen(tmp_path, 10, 0) != peer.chosen(tmp_path, 10, 1)
    assert len({sample["question"] for sample in first}) == 10
    with pytest.raises(SystemExit, match="has 20 questions; --samples asks for 21"):
        peer.chosen(tmp_path, 21, 0)
