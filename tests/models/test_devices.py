"""Devices and dtypes by name: what there is, what there is not, and everything on one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.errors import GracecError
from gracec.lmms_eval import Gracec
from gracec.models.devices import device_named, dtype_named, same_device
from gracec.models.loading import load_model
from gracec.models.skeleton import model_without_weights
from tests.test_cli import gracec as command
from tests.tiny import tiny_batch, tiny_image, tiny_llava, tiny_processor


def test_devices_and_dtypes_have_names() -> None:
    cpu = torch.device("cpu")
    assert (device_named(None), device_named("cpu"), device_named(cpu)) == (None, cpu, cpu)
    assert dtype_named("bfloat16") is dtype_named(torch.bfloat16) is torch.bfloat16
    assert dtype_named(None) is None
    assert same_device(cpu, torch.device("cpu:0")) and not same_device(cpu, torch.device("meta"))


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("gpu", "device: unknown device 'gpu'; use cpu, or cuda, or cuda:1"),
        ("meta", "device: nothing can be computed on meta; use cpu or cuda"),
        ("xpu", "device: there is no xpu on this machine, or torch is built without it; use cpu"),
        ("cuda:7", "device: there is no cuda:7, the machine has 2 of cuda; use cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_told(
    device: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(GracecError) as error:
        device_named(device)
    assert str(error.value) == line


def test_everybody_refuses_them(saved: Path, tmp_path: Path) -> None:
    no_device = "there is no xpu on this machine"
    for call in (
        lambda: gracec.compile(saved, device="xpu"),
        lambda: gracec.load(tmp_path, device="xpu"),
        lambda: Gracec(pretrained=str(saved), device="xpu"),
    ):
        with pytest.raises(GracecError, match=no_device):
            call()
    tiny_image().save(tmp_path / "x.png")
    for arguments in (
        ("compile", saved, "--out", tmp_path / "out"),
        ("run", saved, "--image", tmp_path / "x.png", "--prompt", "x"),
        ("doctor", saved),
    ):
        done = command(*arguments, "--device", "xpu")
        assert done.returncode == 2 and no_device in done.stderr, arguments
        done = command(*arguments, "--dtype", "int3")
        assert done.returncode == 2 and "unknown dtype 'int3'" in done.stderr, arguments


def test_a_model_in_memory_is_not_moved(llava: LlavaForConditionalGeneration) -> None:
    with pytest.raises(GracecError, match="dtype bfloat16: the model is in memory, in float32"):
        gracec.compile(llava, dtype="bfloat16")


def test_a_named_model_is_read_in_a_dtype_and_an_artifact_runs_in_one(
    tmp_path: Path,
) -> None:
    tiny_llava(tie=True, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    placed = {"device": "cpu", "dtype": "bfloat16"}
    gracec.compile(
        tmp_path / "model", "w4a16-ptq", output_dir=tmp_path / "out", formats=(), **placed
    )
    assert load_model(tmp_path / "model", torch.float16).dtype == torch.float16
    assert model_without_weights(tmp_path / "model", torch.float16).dtype == torch.float16
    narrow = gracec.load(tmp_path / "out")
    wide = gracec.load(tmp_path / "out", device="cpu", dtype="float32")
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert wide.frozen.dtype == torch.bfloat16  # what would be saved again
    found, expected = (model(**tiny_batch()).logits.float() for model in (narrow, wide))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "part",
    [
        "operators",
        "compiled",
        pytest.param("trained", marks=pytest.mark.slow),
        pytest.param("patches", marks=pytest.mark.slow),
    ],
)
def test_everything_is_on_one_device(part: str, tmp_path: Path) -> None:
    """On a pretend one, which refuses tensors of another: in a process of its own."""
    command = [sys.executable, "-m", "tests.on_pretend_device", part, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"{part}: done"
