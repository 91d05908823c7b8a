"""What is measured: a name, the runtime, and where `prepare.py` puts its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS: Mapping[str, str] = {
    "smollm2": "SmolLM2-135M-Instruct, the weights of its Q4_1 file",
    "1b": "a Llama of 1.1 billion random parameters",
    "tiny": "a Llama of 70,000 random parameters, which tests the harness",
}
LENGTHS: Mapping[str, tuple[int, int]] = {"smollm2": (400, 64), "1b": (128, 16), "tiny": (400, 64)}
"""Model -> tokens of the prompt whose reading is timed, and tokens decoded. Few for the slow one,
so that there can be several rounds."""
WORK = Path(__file__).resolve().parents[2] / "build" / "decode"
PEERS = "what peer_requirements.txt asks for"
DENSE, GGUF, GENAI, FLOAT32 = "hf", "model.gguf", "genai", "onnx-float32"
"""Files and folders: the Hugging Face decoder in float32, that of llama.cpp, and so on."""
QUANTIZER_GROUP = 32
QUANTIZER = f"onnx-quantizer-g{QUANTIZER_GROUP}"
TORCH, HALF, LLAMA = "torch float32", "torch bfloat16", "llama.cpp Q4"
REFERENCES = {"x_torch_fp32": TORCH, "x_torch_bf16": HALF, "x_llama.cpp": LLAMA}
"""Column -> the variant that the ratios in it are against."""


@dataclass(frozen=True)
class Artifact:
    """A model that gracec compiles: 4 bits in the decoder."""

    group_size: int
    head_bits: int | None = None

    @property
    def folder(self) -> str:
        head = f"-head{self.head_bits}" if self.head_bits else ""
        return f"int4-g{self.group_size}{head}"

    @property
    def recipe(self) -> dict[str, Any]:
        weights = {"decoder": {"bits": 4, "group_size": self.group_size}}
        if self.head_bits:
            weights["head"] = {"bits": self.head_bits, "group_size": self.group_size}
        return {"name": self.folder, "weights": weights}


@dataclass(frozen=True)
class Variant:
    """A row of the scoreboard.

    Attributes:
        engine: of `engines.py`.
        path: file or folder, within the folder of the model.
        weights: the folder whose weights it has, if any: torch's greedy tokens on those in float32
            are compared with its own.
        options: of the engine.
        peer: it runs in the environment of the peers.
        ops, mode: of `export_onnx`, where gracec makes it from the artifact `weights`.
    """

    name: str
    engine: str
    path: str
    weights: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: bool = False
    ops: str = ""
    mode: str = ""


def exported(ops: str, mode: str, artifact: Artifact) -> Variant:
    """gracec on ONNX Runtime."""
    head = f"int{artifact.head_bits}" if artifact.head_bits else "fp32"
    name = f"gracec {mode} {ops} g{artifact.group_size} head {head}"
    path = f"onnx-{ops}-{mode}-{artifact.folder}"
    return Variant(name, "onnx", path, artifact.folder, ops=ops, mode=mode)


PLAIN, WIDE, NARROW = ARTIFACTS = (Artifact(64), Artifact(64, 8), Artifact(64, 4))
VARIANTS = (
    Variant(TORCH, "torch", DENSE, DENSE, {"dtype": "float32"}),
    Variant(HALF, "torch", DENSE, DENSE, {"dtype": "bfloat16"}),
    Variant("torchao int4 g64 bfloat16", "torchao", PLAIN.folder, PLAIN.folder),
    Variant("onnxruntime float32", "onnx", FLOAT32, DENSE),
    Variant(f"onnxruntime quantizer int4 g{QUANTIZER_GROUP}", "onnx", QUANTIZER),
    Variant("onnxruntime-genai builder int4 g32", "genai", GENAI, peer=True),
    Variant(LLAMA, "llama.cpp", GGUF, peer=True),
    exported("qdq", "faithful", PLAIN),
    exported("qdq", "fast", PLAIN),
    exported("qdq", "fast", WIDE),
    exported("qdq", "fast", NARROW),
    exported("matmulnbits", "fast", NARROW),
)
