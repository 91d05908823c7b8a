"""The file that says how ONNX graphs are to be run, and sessions made as it says.

    DIR/onnx/session.json   the files with their SHA-256, the options that ONNX Runtime needs to
                            compute what was checked, the oldest version that knows them, and the
                            figures of the gates

The accuracy level of the INT4 kernel is an option of the session, since a standard graph cannot
hold it: without this file the runtime would round activations to 8 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from gracec._version import __version__
from gracec.errors import GracecError
from gracec.kernels.onnxruntime import ACCURACY_LEVEL
from gracec.store import file_sha256

SESSION_FILE, FOLDER = "session.json", "onnx"
FORMAT_VERSION = 1
MINIMUM_RUNTIME = "1.24"
MINIMUM_RUNTIME_8_BITS = "1.31"
"""1.24 does not fuse standard operators with 8-bit codes; versions between have not been tried, nor
any but this one on quantized activations."""
PROVIDERS = ["CPUExecutionProvider"]
AGAIN = "copy the directory again or export the model again"


@dataclass(frozen=True)
class SessionConfig:
    """What `session.json` holds.

    Attributes:
        graphs: name of a graph -> its file, within the folder.
        sha256: name of a file -> its SHA-256.
        kernels: name of a graph -> matmuls that run on the INT4 kernel.
        options: entries of the runtime's session configuration.
        gates: figures of the gates.
    """

    family: str
    ops: str
    mode: str
    graphs: Mapping[str, str]
    sha256: Mapping[str, str]
    kernels: Mapping[str, int]
    options: Mapping[str, str]
    gates: Mapping[str, Any]
    minimum_runtime: str
    written_with: str = ort.__version__
    gracec: str = __version__
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write `session.json` into a folder."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False)
        (folder / SESSION_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> SessionConfig:
        """Read it back, and hold the files and the installed runtime to it.

        Raises:
            GracecError: if it is missing or not readable, a file is not the one that was written,
                or the runtime is too old.
        """
        path = folder / SESSION_FILE
        if not path.is_file():
            raise GracecError(
                "missing; without its options the runtime computes something else",
                where=str(path),
                fix=AGAIN,
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise GracecError("not a session file", where=str(path), fix=AGAIN) from error
        if version != FORMAT_VERSION:
            raise GracecError(
                f"format version {version}, this gracec reads {FORMAT_VERSION}",
                where=str(path),
                fix="export the model again",
            )
        try:
            config = cls(**fields)
        except TypeError as error:
            raise GracecError("not a session file", where=str(path), fix=AGAIN) from error
        if _numbers(ort.__version__) < _numbers(config.minimum_runtime):
            raise GracecError(
                f"needs onnxruntime {config.minimum_runtime}, {ort.__version__} is installed",
                where=str(path),
                fix="pip install -U onnxruntime",
            )
        for name, expected in config.sha256.items():
            file = folder / name
            if not file.is_file():
                raise GracecError("missing", where=str(file), fix=AGAIN)
            if file_sha256(file) != expected:
                raise GracecError(
                    "the file is not the one that was written (sha256 differs)",
                    where=str(file),
                    fix=AGAIN,
                )
        return config


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


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
