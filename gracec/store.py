"""The canonical artifact: integer codes and scales, everything else as it is, and a manifest.

    DIR/gracec/gracec.safetensors   <fqn>.codes   uint8 [N, K / 2], two codes a byte, low nibble
                                                  first (int8 [N, K] for 8-bit codes, odd widths);
                                                  of routed experts, one after the other, so that
                                                  N is experts times outputs
                                    <fqn>.scales  bfloat16 [N, K / group_size]; negative ones too,
                                                  where the spec is signed
                                    <fqn>.input_scales, <fqn>.input_zero_points
                                                  bfloat16 and int32, of the input of the linear
                                                  where the recipe quantizes activations
                                    <fqn>         every other parameter and buffer, those of
                                                  adapters among them: <linear>.lora_A.weight
    DIR/gracec.json                 the manifest: format version, spec of each weight and of each
                                    input, number of experts of each weight that has some, scaling
                                    of each adapter, sha256, report
    DIR/config.json ...             the Hugging Face configuration and processor

The tensors lie in a folder of their own, because some runtimes load every safetensors file that
they find at the top level of a model directory.

Every file of the directory has its sha256 in the manifest, and the manifest has one of itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gracec.directories import (
    MANIFEST,
    check_target,
    files_in,
    is_artifact,
    write_directory,
)
from gracec.errors import GracecError
from gracec.file_hashes import (
    AGAIN,
    check_configuration,
    check_files,
    file_sha256,
    hashes_of,
    inside,
    json_sha256,
)
from gracec.json_files import JsonModel, check_fields, read_json_object
from gracec.quant import QuantSpec
from gracec.quant.frozen import Experts, FrozenActivation, FrozenWeight, check_frozen
from gracec.quant.observers import ActivationSpec

__all__ = [
    "MANIFEST",
    "Manifest",
    "Store",
    "StoredWeights",
    "change_manifest",
    "check_target",
    "file_sha256",
    "is_artifact",
    "read_manifest",
    "read_store",
    "write_directory",
    "write_store",
]

TENSORS = "gracec/gracec.safetensors"
FORMAT_VERSION = 5
OLDEST_VERSION = 2
"""2: codes alone, 3: with grids of inputs, 4: with adapters, 5: with the hash of every file, and
with experts and signed scales. A version knows what those before it do, and an older gracec
refuses it."""
SEAL = "manifest_sha256"


class WeightFields(JsonModel):
    """The fields of a `QuantSpec`."""

    bits: int
    group_size: int
    parametrization: str
    scale_grid: str
    granularity: str = "per_group"
    signed: bool = False


class ActivationFields(JsonModel):
    """The fields of an `ActivationSpec`."""

    bits: int = Field(ge=2, le=8)
    granularity: str
    group_size: int = Field(gt=0)
    observer: str
    percentile: float
    symmetric: bool


class ExpertsFields(JsonModel):
    """The fields of `Experts`."""

    count: int = Field(gt=0)
    transposed: bool = False


class Manifest(JsonModel):
    """What `gracec.json` holds.

    Attributes:
        files: name of every other file, with slashes -> its SHA-256; empty before version 5.
        sha256: of the tensors, before version 5.
        manifest_sha256: of everything else in the manifest, as `json_sha256` takes it.
        weights, activations: FQN -> how it, or the input of its linear, is quantized.
        adapters: linear -> scaling of the LoRA beside it.
        experts: FQN -> how the model holds the weights of experts.
        gracec, torch: the versions that it was written with.
        family, source: of the model that was compiled.
        revision: its commit, where the source is a repository of the Hugging Face Hub.
        formats: name -> folder of each format beside the codes.
        passes: further passes, with their places, that lowering runs.
        report: as `Report.to_dict` has it.
    """

    format_version: int
    weights: dict[str, WeightFields]
    files: dict[str, str] = Field(default_factory=dict)
    sha256: str = ""
    manifest_sha256: str = ""
    activations: dict[str, ActivationFields] = Field(default_factory=dict)
    adapters: dict[str, float] = Field(default_factory=dict)
    experts: dict[str, ExpertsFields] = Field(default_factory=dict)
    gracec: str = ""
    torch: str = ""
    family: str = ""
    source: str = ""
    revision: str = ""
    formats: dict[str, str] = Field(default_factory=dict)
    passes: list[str] = Field(default_factory=list)
    report: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """What an artifact holds.

    Attributes:
        weights: FQN -> codes and scales.
        others: FQN -> every parameter and buffer that is not quantized.
        manifest: JSON-able; "recipe" and "report" among its keys.
        adapters: linear -> scaling of the LoRA beside it, whose tensors are in `others`.
    """

    weights: Mapping[str, FrozenWeight]
    others: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    adapters: Mapping[str, float] = field(default_factory=dict)


class StoredWeights(Mapping[str, FrozenWeight]):
    """FQN -> codes and scales, read from the file at each access and not kept in memory."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, QuantSpec],
        activations: Mapping[str, ActivationSpec],
        experts: Mapping[str, Experts],
    ) -> None:
        self._path, self._specs, self._activations = path, specs, activations
        self._experts = experts

    def __getitem__(self, fqn: str) -> FrozenWeight:
        spec, activation = self._specs[fqn], None
        try:
            with safe_open(self._path, framework="pt") as file:
                codes = file.get_tensor(f"{fqn}.codes")
                scales = self._scales(file, f"{fqn}.scales", _scale_dtype(spec))
                if fqn in self._activations:
                    activation = FrozenActivation(
                        self._scales(file, f"{fqn}.input_scales", torch.bfloat16),
                        file.get_tensor(f"{fqn}.input_zero_points"),
                        self._activations[fqn],
                    )
        except (OSError, SafetensorError) as error:
            raise GracecError(f"{fqn} cannot be read: {error}", where=str(self._path)) from error
        weight = FrozenWeight(codes, scales, spec, activation, self._experts.get(fqn))
        check_frozen(weight, fqn, where=str(self._path))
        return weight

    def _scales(self, file: Any, name: str, dtype: torch.dtype) -> Tensor:
        found: Tensor = file.get_tensor(name)
        if found.dtype != dtype:
            there, meant = (str(one).removeprefix("torch.") for one in (found.dtype, dtype))
            raise GracecError(f"{name} are {there}, not {meant}", where=str(self._path), fix=AGAIN)
        return found.to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def write_store(store: Store, directory: Path) -> None:
    """Write tensors and manifest into an existing directory; equal input gives equal bytes."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, dict[str, Any]] = {}
    activations: dict[str, dict[str, Any]] = {}
    experts: dict[str, dict[str, Any]] = {}
    for fqn, weight in store.weights.items():
        specs[fqn] = weight.spec.to_dict()
        tensors[f"{fqn}.codes"] = weight.stored
        tensors[f"{fqn}.scales"] = weight.scales.to(_scale_dtype(weight.spec))
        if weight.experts is not None:
            experts[fqn] = asdict(weight.experts)
        if weight.activation is not None:
            activations[fqn] = weight.activation.spec.to_dict()
            tensors[f"{fqn}.input_scales"] = weight.activation.scales.to(torch.bfloat16)
            tensors[f"{fqn}.input_zero_points"] = weight.activation.zero_points
    tensors.update({fqn: tensor.detach() for fqn, tensor in store.others.items()})
    # Linears that share an input share its tensors, which a file may not.
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    tensors |= {name: t.clone() for name, t in tensors.items() if name.endswith("_zero_points")}
    path = directory / TENSORS
    path.parent.mkdir()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody but the owner read it
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": hashes_of(directory, files_in(directory)),
        "weights": specs,
        **({"activations": activations} if activations else {}),
        **({"adapters": dict(store.adapters)} if store.adapters else {}),
        **({"experts": experts} if experts else {}),
        **store.manifest,
    }
    _write_manifest(manifest, directory)


def change_manifest(directory: Path, **fields: Any) -> None:
    """Put other values into the manifest of a directory, whose other files stay as they are."""
    manifest = read_json_object(directory / MANIFEST)
    del manifest[SEAL]
    _write_manifest({**manifest, **fields}, directory)


def _write_manifest(manifest: dict[str, Any], directory: Path) -> None:
    check_fields(Manifest, manifest, where=MANIFEST)
    sealed = {**manifest, SEAL: json_sha256(manifest)}
    text = json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact, without its tensors.

    Raises:
        GracecError: if it is missing, unreadable, of another format version, lacks a field or has
            a wrong one, or is not what was written.
    """
    path = directory / MANIFEST
    if not is_artifact(directory):
        raise GracecError("not a gracec artifact", where=str(directory), fix=f"{MANIFEST} missing")
    fields = read_json_object(path, fix=AGAIN)
    found = fields.get("format_version")
    if type(found) is not int or not OLDEST_VERSION <= found <= FORMAT_VERSION:
        raise GracecError(
            f"format version {found}, this gracec reads {OLDEST_VERSION} to {FORMAT_VERSION}",
            where=str(path),
            fix="compile the model again",
        )
    manifest = check_fields(Manifest, fields, where=str(path), fix=AGAIN)
    needed = ("files", SEAL) if found == FORMAT_VERSION else ("sha256",)
    missing = [name for name in needed if not fields.get(name)]
    if missing:
        raise GracecError(f"{missing[0]}: Field required", where=str(path), fix=AGAIN)
    if manifest.files:
        unsealed = {name: value for name, value in fields.items() if name != SEAL}
        if json_sha256(unsealed) != manifest.manifest_sha256:
            raise GracecError("it is not what was written", where=str(path), fix=AGAIN)
    return manifest


def read_store(directory: Path) -> Store:
    """Read an artifact back and hold every file that is read, and every tensor, to its manifest.

    Raises:
        GracecError: if a file is missing, unreadable, of another format version, added or not what
            was written, or the tensors are not those of the specs.
    """
    manifest = read_manifest(directory)
    path = inside(directory, TENSORS)
    if manifest.format_version == FORMAT_VERSION and TENSORS not in manifest.files:
        raise GracecError(f"files.{TENSORS}: missing", where=str(directory / MANIFEST), fix=AGAIN)
    check_files(directory, {TENSORS: manifest.files.get(TENSORS, manifest.sha256)})
    if manifest.files:
        check_configuration(directory, manifest.files)
    specs, activations = _specs(manifest, directory / MANIFEST)
    quantized = {f"{fqn}.{suffix}" for fqn in specs for suffix in ("codes", "scales")}
    inputs = ("input_scales", "input_zero_points")
    quantized |= {f"{fqn}.{suffix}" for fqn in activations for suffix in inputs}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            others = {name: file.get_tensor(name) for name in sorted(names - quantized)}
    except (OSError, SafetensorError) as error:
        raise GracecError(f"not readable: {error}", where=str(path)) from error
    missing = sorted(quantized - names)
    if missing:
        raise GracecError(f"{missing[0]} is missing", where=str(path))
    fields = manifest.model_dump()
    experts = {fqn: Experts(**one.model_dump()) for fqn, one in manifest.experts.items()}
    weights = StoredWeights(path, specs, activations, experts)
    return Store(weights, others, fields, manifest.adapters)


def _scale_dtype(spec: QuantSpec) -> torch.dtype:
    """What holds the scales of a weight exactly."""
    return torch.bfloat16 if spec.scale_grid == "bf16" else torch.float32


def _specs(
    manifest: Manifest, path: Path
) -> tuple[dict[str, QuantSpec], dict[str, ActivationSpec]]:
    """Of weights and inputs by FQN; a value that none can have is an error of the manifest."""
    specs: dict[str, QuantSpec] = {}
    activations: dict[str, ActivationSpec] = {}
    for fqn, fields in manifest.weights.items():
        with _named(f"weights.{fqn}", path):
            specs[fqn] = QuantSpec(**fields.model_dump())
    for fqn, grid in manifest.activations.items():
        with _named(f"activations.{fqn}", path):
            if fqn not in specs:
                raise GracecError("no such weight is quantized")
            activations[fqn] = ActivationSpec(**grid.model_dump())
    return specs, activations


@contextmanager
def _named(field: str, path: Path) -> Iterator[None]:
    try:
        yield
    except GracecError as error:
        raise GracecError(f"{field}: {error}", where=str(path), fix=AGAIN) from None
