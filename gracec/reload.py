"""What was saved is loaded by a process that knows nothing of the compilation, and runs.

Whatever a compilation does in memory and a file does not say is found here: the logits have to be
those that were compiled.

    python -m gracec.reload DIRECTORY EXPECTED TARGET [MODULE ...]

prints how far they are, as JSON; EXPECTED is a safetensors file with a batch and its logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gracec import gates
from gracec.capture import family_of
from gracec.compiled import load
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.journal import Error
from gracec.passes.pipeline import parse_placed
from gracec.targets.base import Runtime, Target

BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Of the largest logit; on one machine the bits are equal, and are not where threads are cut
otherwise."""
OTHER_DEVICE = 1e-1
"""The same where the model is on another device than the processor, on which it is loaded."""
SWITCH = "GRACEC_CHECK_RELOAD"
"""Environment variable: 0 leaves the check out where nobody asks for it."""
LOGITS = "gracec.logits"


def wanted(asked: bool | None) -> bool:
    """Whether the check is asked for, here or by the environment; by default it is."""
    return os.environ.get(SWITCH, "1") != "0" if asked is None else asked


def refusal(frozen: Frozen, target: Target) -> str:
    """Why another process could not load an artifact, or an empty string."""
    for kind in _kinds(frozen, target):
        alone = kind.__module__ == "__main__" or "<locals>" in kind.__qualname__
        if alone or find_spec(kind.__module__) is None:
            return f"{kind.__name__} is known to this process alone"
    return ""


def _kinds(frozen: Frozen, target: Target) -> list[type[Any]]:
    """Classes that loading needs, which may be those of a module that no package declares."""
    passes = [type(parse_placed(text).item) for text in frozen.passes]
    return [type(target), type(family_of(frozen.skeleton)), *passes]


def reloaded_equals_compiled(
    directory: Path, frozen: Frozen, runtime: Runtime, target: Target
) -> Error:
    """Gate: a fresh process that loads an artifact computes the logits that are in memory.

    Args:
        directory: of the artifact.
        frozen: the model; its reference gives the batch, and the positions that are compared.
        runtime: what the target made of it in this process.

    Raises:
        GateError: if it cannot be loaded, or computes something else.
    """
    assert frozen.reference is not None
    reference = frozen.reference.short()
    batch = _given(reference.batch, runtime.dtype)
    with torch.no_grad():
        logits = reference.tail(runtime(**batch).logits).cpu()
    with tempfile.TemporaryDirectory(prefix="gracec-reload-") as folder:
        file = Path(folder) / "expected.safetensors"
        tensors = {**{n: t.cpu() for n, t in batch.items()}, LOGITS: logits}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        modules = sorted({kind.__module__ for kind in _kinds(frozen, target)})
        given = [str(directory), str(file), target.name, *modules]
        command = [sys.executable, "-P", "-m", __name__, *given]
        done = subprocess.run(command, capture_output=True, env=_environment(), check=False)
    where, fix = "what was saved, in a fresh process", f"look at it: compile with {SWITCH}=0"
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it ended"]
        raise GateError(f"the result cannot be used: {lines[-1]}", where=where, fix=fix)
    change = json.loads(done.stdout.splitlines()[-1])["change"]
    bound = BOUND[runtime.dtype] if runtime.device.type == "cpu" else OTHER_DEVICE
    if not change <= bound:
        raise GateError(
            f"the logits differ from those that were compiled by {change:.3g} of the largest, the "
            f"bound is {bound:.0e}",
            where=where,
            fix=fix,
        )
    return Error(change, bound, "of the largest logit, in a fresh process")


def main(directory: str, expected: str, target: str, *modules: str) -> None:
    """What the fresh process does.

    Args:
        modules: that define what is loaded with, besides what packages declare.
    """
    for module in modules:
        import_module(module)
    batch = load_file(expected)
    logits = batch.pop(LOGITS)
    found: Any = load(directory, target)(**batch).logits[:, -logits.shape[1] :]
    same = found.shape == logits.shape
    change = (
        gates.logits_are_those_of("", logits, found, float("inf"), "") if same else float("inf")
    )
    print(json.dumps({"change": change}))


def _given(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


def _environment() -> dict[str, str]:
    """With this gracec, wherever it was imported from, and as many threads: sums are cut alike."""
    threads = str(torch.get_num_threads())
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except GracecError as error:
        sys.exit(str(error))
