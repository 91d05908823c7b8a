"""A compiled vision-language model, and how it is loaded."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gracec._version import __version__
from gracec.backends.base import parse_formats
from gracec.backends.onnx.format import Onnx
from gracec.errors import GracecError, first_line
from gracec.frozen import Frozen
from gracec.ir.program import Program
from gracec.models.devices import device_and_dtype, device_named, dtype_named, same_device
from gracec.models.hub import find_artifact, find_description, find_model, has_graphs
from gracec.models.loading import load_model, load_processor
from gracec.quant.frozen import FrozenWeight
from gracec.report import Report
from gracec.stages.publish import read_artifact, write_artifact, write_formats
from gracec.store import is_artifact
from gracec.targets.base import AUTO, Runtime, Target, target_named

if TYPE_CHECKING:
    from gracec.backends.onnx.runner import OnnxModel

LOGGER = logging.getLogger("gracec")


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
    def config(self) -> PreTrainedConfig:
        """Of the model, as transformers reads it."""
        return self.runtime.config

    @property
    def generation_config(self) -> GenerationConfig:
        """What `generate` goes by where it is told nothing else; it may be changed."""
        found: GenerationConfig = self._generating().generation_config
        return found

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self._generating().generation_config = config

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

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """Token ids [B, T + new], or an output if `return_dict_in_generate` is set.

        Takes a batch from the processor, and all that `generate` of transformers takes: settings,
        `generation_config`, `streamer`, `stopping_criteria`, `logits_processor`, ...
        """
        if inputs is not None:
            options["input_ids"] = inputs
        return self.runtime.generate(**options)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> Self:
        """Itself: a compiled model is never trained."""
        return self

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Itself on a device, where the target can move it.

        Raises:
            GracecError: if it cannot, or for another dtype, which the kernels were chosen for.
        """
        device, dtype = device_and_dtype(device, dtype)
        if dtype not in (None, self.dtype):
            raise GracecError(
                f"the kernels were made for {self.dtype}, and {dtype} is asked for",
                where="to",
                fix="compile again with that dtype",
            )
        if device is None or same_device(device, self.device):
            return self
        if not hasattr(self.runtime, "to"):
            raise GracecError(
                f"weights are packed for {self.device}, and cannot be moved to {device}",
                where="to",
                fix="save it, and load it on that device",
            )
        self.runtime.to(device)
        return self

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

    def push_to_hub(
        self,
        repo_id: str,
        formats: str | Sequence[str] = ("hf",),
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository of the Hub.

        Args:
            repo_id: "user/name", or "name" for the user of the token; created if it is not there.
            formats: as for `save_pretrained`.
            private: of a repository that is created; by default what the owner has set.
            commit_message: by default one that says what it is.
            token: of the Hub; by default the one that `hf auth login` keeps.
            revision: branch to commit to, created if it is not there.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit, which has the address of the repository.

        Raises:
            GracecError: as `save_pretrained` does, or if the Hub does not take it.
        """
        message = commit_message or f"Upload {self.source}, compiled with gracec {__version__}"
        with tempfile.TemporaryDirectory(prefix="gracec-push-") as folder:
            directory = Path(folder) / "model"
            self.save_pretrained(directory, formats)
            api = HfApi(token=token, library_name="gracec", library_version=__version__)
            try:
                name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None and not create_pr:
                    api.create_branch(name, branch=revision, exist_ok=True)
                return api.upload_folder(
                    repo_id=name,
                    folder_path=directory,
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                )
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise GracecError(
                    f"the Hub does not take it ({first_line(error)})",
                    where=repo_id,
                    fix="check the name, the network and the token (`hf auth login`)",
                ) from error

    def export_onnx(
        self, directory: str | Path, ops: str | None = None, mode: str | None = None
    ) -> tuple[str, ...]:
        """Write ONNX graphs with their configuration and processor; `gracec.load(directory,
        target="onnxruntime")` runs them.

        Args:
            ops: "matmulnbits" (the operator of ONNX Runtime, which holds its accuracy level and has
                an INT4 kernel on GPUs) or "qdq" (standard ONNX); by default what the recipe says.
            mode: "faithful" (kernels compute in float32), "fast" (they round activations to 8
                bits) or "auto" (fast where that changes nothing that counts); by default what the
                recipe says, which is "auto" where it says nothing.

        Returns:
            What the gates found, for a user to read; `onnx/session.json` has the figures.

        Raises:
            GracecError: if the directory exists, or the model has no ONNX graphs.
            GateError: if the graphs are not numerically what they should be.
        """
        form = Onnx(ops or "", mode or "")
        return tuple(map(str, write_formats(Path(directory), self.frozen, [form])))

    def _generating(self) -> Any:
        """What holds the settings of generation: the model of torch, or the runtime itself."""
        return self.runtime if hasattr(self.runtime, "generation_config") else self.model

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
    target: Literal["torchao"],
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
    """Load what `CompiledModel.save_pretrained` wrote, in what runs it fastest here.

    A directory with ONNX graphs is loaded as an `OnnxModel`, which calls and generates as a
    `CompiledModel` does; what is saved and exported again is a `CompiledModel`, which target
    "torchao" gives: the codes, which give the tokens that they gave when they were saved. Graphs
    may be in fast mode: `session_config.mode` says so.

    Args:
        directory: an artifact, or "org/name" of a repository of the Hugging Face Hub that holds
            one. A directory that exists is meant before a repository of its name.
        target: what runs it: "auto" (the default), which is "onnxruntime" on the processor where
            there are ONNX graphs, unless a dtype is asked for that they do not compute in, and
            else "torchao"; or one of these, or of another package. Graphs that are there and are
            not whole are an error.
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
    place, precision = device_named(device), dtype_named(dtype)
    chosen = _chosen(target or backend, directory, revision, place, precision)
    path = find_artifact(directory, revision, onnx=chosen.reads).path
    found = chosen.read(path)
    if found is not None:
        _check_fixed(found, chosen, place, precision)
        return found
    frozen, report = read_artifact(path)
    runtime, _ = chosen.lower(_placed(frozen, chosen, place, precision))
    return CompiledModel(frozen, runtime, report)


def _chosen(
    target: str | Target | None,
    directory: str | Path,
    revision: str | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Target:
    """The target that is named, or the one that is fastest."""
    if target not in (None, AUTO):
        return target_named(target)
    fits = (device is None or device.type == "cpu") and dtype in (None, torch.float32)
    graphs = fits and has_graphs(directory, revision)
    chosen = target_named("onnxruntime" if graphs else "torchao")
    LOGGER.info("%s runs %s", chosen.name, directory)
    return chosen


def open_model(
    named: str | Path,
    target: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[Any, Any]:
    """What answers questions, and its processor: a gracec artifact, or a Hugging Face model.

    Args:
        named: a directory, or "org/name" of a repository of the Hugging Face Hub.
        target: of an artifact, as for `load`, whose other arguments these are as well.

    Raises:
        GracecError: if it is neither.
    """
    where, precision = device_named(device), dtype_named(dtype)
    if target in (None, AUTO) and _is_plain(named, revision):
        path = find_model(named, revision).path
        return load_model(path, precision, where), load_processor(path)
    loaded: Any = load(named, target, revision=revision, device=where, dtype=precision)
    return loaded, loaded.processor


def _is_plain(named: str | Path, revision: str | None) -> bool:
    """Whether nothing of gracec is in it, neither codes nor graphs."""
    artifact = is_artifact(find_description(named, revision).path)
    return not artifact and not has_graphs(named, revision)


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
