"""Ask transformers.js in Node; `transformers_js.mjs` is the other half."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NODE = Path(__file__).parents[1] / "examples/node"
SECONDS = 300
"""After which Node is killed."""


@dataclass(frozen=True)
class Told:
    """The new tokens and the tensors that they are from, or what transformers.js threw."""

    tokens: list[int] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""


FAMILIES = ("idefics3", "llava", "qwen2_5_vl", "qwen2_vl", "smolvlm")
"""Model types of directories that it reads and answers from."""


def _run(
    directory: Path, lines: Sequence[Mapping[str, Any]], tokens: int
) -> subprocess.CompletedProcess[str]:
    script, program = Path(__file__).with_suffix(".mjs"), NODE / "answer.mjs"
    return subprocess.run(
        ["node", script, program, directory, str(tokens)],
        input="\n".join(map(json.dumps, lines)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def why_not(directory: Path, asked: Mapping[str, Any]) -> str:
    """What transformers.js throws when it loads a directory, or when it is asked."""
    done = _run(directory, [asked], tokens=1)
    if done.returncode:
        return done.stderr
    error: str = json.loads(done.stdout)["error"]
    return error


def ask(directory: Path, asked: Sequence[Mapping[str, Any]], tokens: int) -> list[Told]:
    """Answers from a directory with ONNX graphs, all of one process.

    Args:
        asked: {"images": files, "question": text} for the processor of transformers.js, or
            {"inputs": tensors by name} to leave it out.
    """
    lines = [
        {**one, "inputs": {name: _packed(tensor) for name, tensor in one["inputs"].items()}}
        if "inputs" in one
        else one
        for one in asked
    ]
    done = _run(directory, lines, tokens)
    assert done.returncode == 0, done.stderr
    told = []
    for found in map(json.loads, done.stdout.splitlines()):
        inputs = {name: _unpacked(tensor) for name, tensor in found.pop("inputs", {}).items()}
        told.append(Told(**found, inputs=inputs))
    assert len(told) == len(asked), done.stderr
    return told


def _packed(tensor: Tensor) -> dict[str, Any]:
    array = np.ascontiguousarray(tensor.numpy())
    data = base64.b64encode(array.tobytes()).decode()
    return {"type": str(array.dtype), "dims": list(array.shape), "data": data}


def _unpacked(packed: Mapping[str, Any]) -> Tensor:
    array = np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["type"])
    return torch.from_numpy(array.reshape(packed["dims"]).copy())
