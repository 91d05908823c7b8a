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


PRETEND = """
import sys
import torch
import tests.pretend_device
import gracec
from tests.tiny import tiny_batch
from tests.training.test_run import recipe, records

try:
    torch.ones(2, device="sim") + torch.ones(2)
    raise SystemExit("it mixes devices")
except RuntimeError:
    pass
model, out = sys.argv[1:]
training = {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "held_out": 0.25}
compiled = gracec.compile(
    model,
    recipe(training=training),
    teacher=model,
    train_data=records(4),
    device="sim",
    output_dir=out,
    formats="hf,torchao",
    check_reload=False,
    progress=False,
)
assert compiled.device.type == "sim", compiled.device
assert compiled.report.training["steps"] == 1
batch = tiny_batch()
here = gracec.load(out)
options = {"max_new_tokens": 3, "do_sample": False}
there = compiled.generate(**tiny_batch(compiled.model), **options)
assert there.device.type == "sim" and here.device.type == "cpu"
assert torch.equal(here.generate(**batch, **options), there.cpu())
try:
    gracec.load(out, device="sim")
except gracec.errors.GracecError as error:
    print(error)
"""


@pytest.mark.slow
def test_everything_is_on_one_device(saved: Path, tmp_path: Path) -> None:
    """On a pretend one, which refuses tensors of another: in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PRETEND, str(saved), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no kernel of torchao takes it there: there is no INT4 kernel for sim" in done.stdout
