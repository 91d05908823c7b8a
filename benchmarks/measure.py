"""What the benchmarks have in common: a process for each row, its memory, and the results file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def random_llava(
    vision: Mapping[str, Any], text: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Any:
    """A LLaVA with seeded random weights.

    Args:
        vision, text: fields of `CLIPVisionConfig` and `LlamaConfig`; by default 3 vision layers,
            pictures of 56 px in 16 patches, 8 key heads and 512 positions.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tower = {"num_hidden_layers": 3, "image_size": 56, "patch_size": 14, **vision}
    decoder = {"num_key_value_heads": 8, "max_position_embeddings": 512, **text}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**decoder),
        image_token_index=5,
        image_seq_length=(tower["image_size"] // tower["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def peak_mib() -> float:
    """Largest resident set of this process since `forget_peak`, in MiB (Linux)."""
    return _status_mib("VmHWM")


def resident_mib() -> float:
    """Resident set of this process now, in MiB (Linux)."""
    return _status_mib("VmRSS")


def forget_peak() -> None:
    """Have the peak start again from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_a_process(script: str, arguments: Mapping[str, Any]) -> Any:
    """The JSON that a benchmark prints for one row, run in a process of its own."""
    options = [f"--{n}" if v is True else f"--{n}={v}" for n, v in arguments.items()]
    command = [sys.executable, script, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_result(
    name: str,
    what: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    arguments: str = "",
    script: str = "",
    load: float | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Write `results/<name>.json`, as `scoreboard.py` reads it.

    Args:
        what: one line for a reader.
        arguments: of the command.
        script: in `benchmarks`; `<name>.py` by default.
        load: of the machine when the benchmark began.
        versions: of what was measured, beside torch.
    """
    result = {
        "what": what,
        "command": f"python benchmarks/{script or f'{name}.py'} {arguments}".strip(),
        "environment": environment(load) | ({"versions": versions} if versions else {}),
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def environment(load: float | None = None) -> dict[str, Any]:
    """Processor and versions."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_at_start": None if load is None else round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
