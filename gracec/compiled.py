"""A compiled vision-language model, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gracec.backends.base import parse_formats
from gracec.backends.onnx.format import Onnx
from gracec.errors import GracecError
from gracec.frozen import Frozen
from gracec.ir.program import Program
from gracec.models.devices import device_named, dtype_named
from gracec.models.hub import find_artifact
from gracec.quant.frozen import FrozenWeight
from gracec.report import Report
from gracec.stages.publish import read_artifact, write_artifact, write_formats
from gracec.targets.base import Runtime, Target, target_named

if TYPE_CHECKING:
    from gracec.backends.onnx.runner import OnnxModel


class CompiledModel:
    """A frozen model and what runs it.

    Calling it runs the lowered graph; `generate` runs the Hugging Face generation loop over modules
    that hold the very same packed tensors.

    Attributes:
        frozen: codes, scales and everything else; formats are written from it.
        runtime: what the target made of it.
        report: what was done, with all figures.
    """

    def __init__(self, frozen: Frozen, runtime: Runtime, report: Report) -> None:
        self.frozen, self.runtime, self.report = frozen, runtime, report

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model with packed INT4 weights in the place of the planned ones."""
        found: PreTrainedModel = self._of_runtime("model")
        return found

    @property
    def program(self) -> Program:
        """The lowered graph."""
        found: Program = self._of_runtime("program")
        return found

    @property
    def weights(self) -> Mapping[str, FrozenWeight]:
        """FQN -> canonical codes and scales; read from the artifact when it was loaded."""
        return self.frozen.weights

    @property
    def processor(self) -> Any:
        """Of the original model, or None."""
        return self.frozen.processor

    @property
    def source(self) -> str:
        """Name of the original model."""
        return self.frozen.name

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.runtime.dtype

    def __call__(self, **inputs: Tensor) -> CausalLMOutput:
        """Logits [B, T, V] of a batch from the processor."""
        found: CausalLMOutput = self.runtime(**inputs)
        return found

    def generate(self, **inputs: Any) -> Tensor:
        """Token ids [B, T + new]; takes what the model's own `generate` takes."""
        return self.runtime.generate(**inputs)

    def save_pretrained(
        self,
        directory: str | Path,
        formats: str | Sequence[str] = ("hf",),
        *,
        overwrite: bool = False,
    ) -> tuple[str, ...]:
        """Write the canonical artifact, which `gracec.load` reads, and formats for other libraries.

        Args:
            formats: names of formats: "hf" (compressed-tensors, for plain transformers), "torchao",
                "awq", "onnx", a text "hf,awq", or "all"; () for none.
            overwrite: replace an artifact that is there, in a single step.

        Returns:
            What a user should know about the formats.

        Raises:
            GracecError: if the directory exists, a format cannot hold the weights, or the disk does
                not take it. Nothing half-written is left.
        """
        wanted = parse_formats(formats)
        _, notes = write_artifact(
            Path(directory), self.frozen, wanted, self.report, overwrite=overwrite
        )
        return tuple(map(str, notes))

    def export_onnx(
        self, directory: str | Path, ops: str = "matmulnbits", mode: str = "faithful"
    ) -> tuple[str, ...]:
        """Write ONNX graphs with their configuration and processor; `gracec.load(directory,
        target="onnxruntime")` runs them.

        Args:
            ops: "matmulnbits" (the operator of ONNX Runtime, which holds its accuracy level and has
                an INT4 kernel on GPUs) or "qdq" (standard ONNX).
            mode: "faithful" (kernels compute in float32) or "fast" (they round activations to 8
                bits).

        Returns:
            What the gates found, for a user to read; `onnx/session.json` has the figures.

        Raises:
            GracecError: if the directory exists, or the model has no ONNX graphs.
            GateError: if the graphs are not numerically what they should be.
        """
        return tuple(map(str, write_formats(Path(directory), self.frozen, [Onnx(ops, mode)])))

    def _of_runtime(self, name: str) -> Any:
        if not hasattr(self.runtime, name):
            raise GracecError(
                f"{type(self.runtime).__name__} has no {name}", fix="compile for target torchao"
            )
        return getattr(self.runtime, name)


class _Placement(TypedDict, total=False):
    """Keywords of `load` that have the same meaning whatever is loaded."""

    revision: str | None
    device: str | torch.device | None
    dtype: str | torch.dtype | None


@overload
def load(
    directory: str | Path,
    target: Literal["torchao"] | None = None,
    *,
    backend: None = None,
    **placement: Unpack[_Placement],
) -> CompiledModel: ...
@overload
def load(
    directory: str | Path,
    target: Literal["onnx", "onnxruntime"],
    *,
    backend: None = None,
    **placement: Unpack[_Placement],
) -> OnnxModel: ...
@overload
def load(
    directory: str | Path,
    target: None = None,
    *,
    backend: Literal["onnx"],
    **placement: Unpack[_Placement],
) -> OnnxModel: ...
@overload
def load(
    directory: str | Path,
    target: str | Target | None = None,
    *,
    backend: str | None = None,
    **placement: Unpack[_Placement],
) -> Any: ...
def load(
    directory: str | Path,
    target: str | Target | None = None,
    *,
    backend: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """Load what `CompiledModel.save_pretrained` wrote; the same codes, the same tokens.

    Args:
        directory: an artifact, or "org/name" of a repository of the Hugging Face Hub that holds
            one. A directory that exists is meant before a repository of its name.
        target: what runs it: "torchao" (the default); "onnxruntime", which also runs what
            `export_onnx` wrote; or one of another package.
        backend: the word for `target` in versions before.
        revision: branch, tag or commit of the repository; by default its main branch.
        device: where it runs, "cpu" or "cuda"; by default the processor. Codes are packed for the
            kernels of that device.
        dtype: of the activations, "bfloat16", "float16" or "float32"; by default that of the
            recipe that it was compiled with. What is saved again is as it was.

    Raises:
        GracecError: if it is not a whole artifact, if there is no such device, or if there or in
            this dtype no kernel takes a weight that one would take otherwise.
    """
    chosen = target_named(target or backend)
    place, precision = device_named(device), dtype_named(dtype)
    path = find_artifact(directory, revision, onnx=chosen.reads).path
    found = chosen.read(path)
    if found is not None:
        _check_fixed(found, chosen, place, precision)
        return found
    frozen, report = read_artifact(path)
    runtime, _ = chosen.lower(_placed(frozen, chosen, place, precision))
    return CompiledModel(frozen, runtime, report)


def _placed(
    frozen: Frozen, target: Target, device: torch.device | None, dtype: torch.dtype | None
) -> Frozen:
    """A model on a device, to be run in a dtype.

    Raises:
        GracecError: if a weight would run dense there, and does not where it was compiled for.
    """
    placed = frozen if device is None else frozen.to(device)
    placed = placed if dtype is None else replace(placed, dtype=dtype)
    if placed is frozen:
        return frozen
    dense = target.dense(placed)
    for fqn in sorted(dense.keys() - target.dense(frozen).keys()):
        raise GracecError(
            f"no kernel of {target.name} takes it there: {dense[fqn]}",
            where=fqn,
            fix="choose another device or dtype",
        )
    return placed


def _check_fixed(
    runtime: Runtime, target: Target, device: torch.device | None, dtype: torch.dtype | None
) -> None:
    """Refuse a device or dtype that a runtime from files does not have, and would ignore."""
    for name, asked, own in (
        ("device", device and device.type, runtime.device.type),
        ("dtype", dtype, runtime.dtype),
    ):
        if asked is not None and asked != own:
            raise GracecError(
                f"target {target.name} has its graphs for {str(own).removeprefix('torch.')}",
                where=f"{name} {str(asked).removeprefix('torch.')}",
                fix=f"leave {name} out, or choose target torchao",
            )
