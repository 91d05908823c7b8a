"""What gracec does on an accelerator, on a pretend one: `tests.pretend_device`.

    python -m tests.on_pretend_device PART FOLDER

Run in a process of its own, since a device is registered for the rest of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import gracec
from gracec import gates
from gracec.capture import capture, captured_equals_eager
from gracec.kernels import torchao
from gracec.models.devices import same_device
from gracec.models.surgery import put_on
from tests import pretend_device
from tests.tiny import tiny_batch, tiny_llava, tiny_processor
from tests.tiny_families import tiny_model
from tests.training.test_run import recipe, records

SIM, CPU = torch.device(pretend_device.NAME), torch.device("cpu")
TRAINING = {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "held_out": 0.25}
OPTIONS: dict[str, Any] = {"device": "sim", "check_reload": False, "progress": False}


def operators(folder: Path) -> None:
    """The device is as strict as CUDA, and so is what the gates make of a graph there."""
    there, here = torch.ones(2, device=SIM), torch.ones(2)
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: nn.functional.linear(torch.ones(2, 2, device=SIM), torch.ones(2, 2)),
    ):
        with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
            mixed()
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)  # a number, as on CUDA
    model = tiny_llava(num_hidden_layers=1)
    stays = capture(model)
    put_on(model, SIM)
    program = capture(model)
    assert captured_equals_eager(program, model) == 3
    assert gates.default_kernels_agree(program, model) == 0
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        stays(**program.example_inputs)


def compiled(folder: Path) -> None:
    """Without data, saved, and loaded where it was and on the processor: the same tokens."""
    pack_for_the_device()
    save_tiny(folder / "model", num_hidden_layers=1)
    asked = patch.object(gates, "default_kernels_agree", wraps=gates.default_kernels_agree)
    with asked as gate:
        there = gracec.compile(
            folder / "model",
            small("ptq"),
            output_dir=folder / "out",
            formats="hf,torchao",
            **OPTIONS,
        )
    gate.assert_called_once()
    assert same_device(there.device, SIM) and "default_kernels_agree" in there.report.gates
    kernels = there.report.gates["int4_kernels"]
    assert kernels.count == kernels.planned > 0
    again, here = gracec.load(folder / "out", device="sim"), gracec.load(folder / "out")
    assert same_device(again.device, SIM) and here.device == CPU
    tokens = [generated(model) for model in (there, again, here)]
    assert all(torch.equal(one, tokens[0]) for one in tokens)


def trained(folder: Path) -> None:
    """Calibrated on data; by GRACE with a copy of itself, and with a wider teacher by its path."""
    save_tiny(folder / "model")
    save_tiny(folder / "wide", seed=7, hidden_size=96, num_attention_heads=6)
    calibrated = gracec.compile(folder / "model", small("gptq"), train_data=records(4), **OPTIONS)
    assert same_device(calibrated.device, SIM)
    for teacher in (None, folder / "wide"):
        found = gracec.compile(
            folder / "model",
            recipe(training=TRAINING),
            teacher=teacher,
            train_data=records(4),
            output_dir=folder / f"by {teacher and teacher.name}",
            formats=(),
            **OPTIONS,
        )
        assert same_device(found.device, SIM) and found.report.training["steps"] == 1
        notes = " ".join(map(str, found.report.notes))
        assert "matmuls compute in bfloat16, which precision auto is on sim" in notes


def patches(folder: Path) -> None:
    """Packed images: their lengths are read from the device once for a graph."""
    model = tiny_model("qwen2_vl")
    put_on(model, SIM)
    program = capture(model)
    blocks = list(program.nodes(torch.ops.gracec.segment_attention.default))
    pretend_device.READS.clear()
    program(**program.example_inputs)
    assert len(pretend_device.READS) == 1 < len(blocks), pretend_device.READS
    assert captured_equals_eager(program, model) == 3


def small(method: str) -> gracec.Recipe:
    """A recipe that trains nothing."""
    calibration = {} if method == "ptq" else {"calibration": {"method": method}}
    weights = {"decoder": {"group_size": 32}}
    return gracec.Recipe.from_dict({"name": "small", "weights": weights, **calibration})


def save_tiny(folder: Path, **options: Any) -> None:
    tiny_llava(tie=True, **options).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


def generated(model: Any) -> Tensor:
    tokens: Tensor = model.generate(**tiny_batch(model.model), max_new_tokens=3, do_sample=False)
    assert tokens.device == model.device
    return tokens.cpu()


def pack_for_the_device() -> None:
    """Let the device have the kernels of CUDA, and be as new as they need."""
    refusal, cuda = torchao.refusal, torch.device("cuda")
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

    def refused(shape: Any, spec: Any, dtype: torch.dtype, device: torch.device) -> str:
        return refusal(shape, spec, dtype, cuda if device.type == SIM.type else device)

    torchao.refusal = refused


PARTS: dict[str, Callable[[Path], None]] = {
    one.__name__: one for one in (operators, compiled, trained, patches)
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Path(sys.argv[2]))
    print(f"{sys.argv[1]}: done")
