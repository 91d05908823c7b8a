"""The file that says how ONNX graphs are to be run, and sessions made as it says.

    DIR/onnx/session.json   the files with their SHA-256, the options that ONNX Runtime needs to
                            compute what was checked, the oldest version that knows them, and the
                            figures of the gates

The accuracy level of the INT4 kernel is an option of the session, since a standard graph cannot
hold it: without this file the runtime would round activations to 8 bits.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from pydantic import Field

from gracec._version import __version__
from gracec.errors import GracecError
from gracec.file_hashes import check_configuration, check_files, inside, json_sha256
from gracec.json_files import JsonModel, check_fields, read_json_object
from gracec.kernels.onnxruntime import ACCURACY_LEVEL

SESSION_FILE, FOLDER = "session.json", "onnx"
FORMAT_VERSION = 3
"""1: graphs and their hashes; 2: with those of configuration and processor, and of itself; 3: a
decoder of gracec's own among the graphs."""
SEAL = "session_sha256"
MINIMUM_RUNTIME = "1.24"
MINIMUM_RUNTIME_8_BITS = "1.31"
"""1.24 does not fuse standard operators with 8-bit codes; versions between have not been tried, nor
any but this one on quantized activations."""
PROVIDERS = ["CPUExecutionProvider"]
AGAIN = "copy the directory again or export the model again"


class SessionConfig(JsonModel):
    """What `session.json` holds.

    Attributes:
        graphs: name of a graph -> its file, within the folder.
        sha256: name of a file of the folder -> its SHA-256; the graphs and their tensors, no more.
        model_files: name of a file beside the folder -> its SHA-256: all that is read of the
            configuration and the processor. Empty in graphs alone, and before version 2.
        kernels: name of a graph -> matmuls that run on the INT4 kernel.
        options: entries of the runtime's session configuration.
        gates: figures of the gates.
        session_sha256: of everything else in the file, as `json_sha256` takes it; from version 2.
    """

    family: str
    ops: str = Field(pattern="^(qdq|matmulnbits|)$")
    mode: str = Field(pattern="^(faithful|fast|)$")
    graphs: dict[str, str]
    sha256: dict[str, str]
    kernels: dict[str, int]
    options: dict[str, str]
    gates: dict[str, Any]
    minimum_runtime: str
    model_files: dict[str, str] = Field(default_factory=dict)
    written_with: str = ort.__version__
    gracec: str = __version__
    format_version: int = FORMAT_VERSION
    session_sha256: str = ""

    def write(self, folder: Path) -> None:
        """Write `session.json` into a folder."""
        fields = self.model_dump(exclude={SEAL})
        sealed = {**fields, SEAL: json_sha256(fields)}
        text = json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False)
        (folder / SESSION_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> SessionConfig:
        """Read it back, and hold the files of the folder and the installed runtime to it.

        Raises:
            GracecError: if it is missing or not readable, a field is missing or wrong, a file is
                not the one that was written or is elsewhere, or the runtime is too old.
        """
        path = folder / SESSION_FILE
        if not os.path.isfile(path):
            raise GracecError(
                "missing; without its options the runtime computes something else",
                where=str(path),
                fix=AGAIN,
            )
        fields = read_json_object(path, fix=AGAIN)
        version = fields.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise GracecError(
                f"format version {version}, this gracec reads 1 to {FORMAT_VERSION}",
                where=str(path),
                fix="export the model again",
            )
        config = check_fields(cls, fields, where=str(path), fix=AGAIN)
        config._check_fields(fields, path)
        if _numbers(ort.__version__) < _numbers(config.minimum_runtime):
            raise GracecError(
                f"needs onnxruntime {config.minimum_runtime}, {ort.__version__} is installed",
                where=str(path),
                fix="pip install -U onnxruntime",
            )
        config._check_files(folder)
        return config

    def check_model(self, directory: Path) -> None:
        """Hold configuration and processor, beside the folder of the graphs, to their hashes.

        Raises:
            GracecError: naming the first file that is missing, is another one, or has been added.
        """
        if self.model_files:
            check_configuration(directory, self.model_files)
        elif self.format_version > 1:
            where = str(directory / FOLDER / SESSION_FILE)
            raise GracecError("model_files: empty", where=where, fix=AGAIN)

    def _check_fields(self, fields: Mapping[str, Any], path: Path) -> None:
        """What one field says of another."""
        unsealed = {name: value for name, value in fields.items() if name != SEAL}
        if self.format_version > 1 and json_sha256(unsealed) != self.session_sha256:
            raise GracecError("it is not what was written", where=str(path), fix=AGAIN)
        if self.options != session_options(self.ops, self.mode):
            raise GracecError("options: not those of ops and mode", where=str(path), fix=AGAIN)
        for name, file in self.graphs.items():
            if file not in self.sha256:
                raise GracecError(f"graphs.{name}: no hash of {file!r}", where=str(path), fix=AGAIN)

    def _check_files(self, folder: Path) -> None:
        """Graphs and their tensors, each where it should be, and nothing else."""
        check_files(folder, self.sha256, fix=AGAIN)
        graphs = set(self.graphs.values())
        paths = [inside(folder, file) for file in graphs]
        try:
            tensors = set[str]().union(*map(_tensor_files, paths))
        except Exception:  # of a library that onnx does not name: the runtime says what is wrong
            return
        for name in sorted((graphs | tensors) ^ self.sha256.keys()):
            listed = "is of none of the graphs" if name in self.sha256 else "has no hash"
            raise GracecError(
                f"sha256: {name!r} {listed}", where=str(folder / SESSION_FILE), fix=AGAIN
            )


def session_options(ops: str, mode: str) -> dict[str, str]:
    """Entries of the session configuration with which the kernels compute as the mode says."""
    if ops == "qdq":
        return {"session.qdq_matmulnbits_accuracy_level": str(ACCURACY_LEVEL[mode])}
    return {}


def open_session(
    path: Path,
    options: Mapping[str, str],
    *,
    threads: int,
    optimized: Path | None = None,
) -> ort.InferenceSession:
    """Have ONNX Runtime load a graph.

    Args:
        threads: that one operator may use.
        optimized: write the graph as the runtime optimized it to this file.

    Raises:
        GracecError: with the runtime's reason, if it does not take the graph.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
        key = "session.optimized_model_external_initializers"
        settings.add_session_config_entry(f"{key}_file_name", f"{optimized.name}_data")
        settings.add_session_config_entry(f"{key}_min_size_in_bytes", "1024")
    try:
        return ort.InferenceSession(str(path), settings, providers=PROVIDERS)
    except Exception as error:  # classes of the runtime's own, without a common one
        lines = str(error).strip().splitlines()
        reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0] if lines else "")
        raise GracecError(
            f"onnxruntime {ort.__version__} cannot load it: {reason}", where=str(path), fix=AGAIN
        ) from error


def _tensor_files(graph: Path) -> set[str]:
    """Names of the files in which a graph has tensors, as it says them."""
    model = onnx.load(str(graph), load_external_data=False)
    found = _tensors(model.graph.initializer, model.graph.node)
    for function in model.functions:
        found = chain(found, _tensors((), function.node))
    return {
        entry.value
        for tensor in found
        for entry in tensor.external_data
        if entry.key == "location" and tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def _tensors(
    initializers: Iterable[onnx.TensorProto], nodes: Iterable[onnx.NodeProto]
) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph, in its nodes and in graphs within them."""
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner.initializer, inner.node)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
