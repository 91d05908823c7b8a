"""What is compared: every run of the comparison with other quantizers, as data.

A cell is one language model, one tool and method, one kind of calibration text, one width and one
group. What calibrates is called by where it is from: "same" is other windows of the text that is
measured, as the papers of these methods do it; "foreign" is text of another kind; "none" is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "ptq"
MODELS: Mapping[str, Path] = {
    "smollm2": ROOT / "build" / "decode" / "smollm2" / "hf",
    "gemma3": ROOT / "build" / "decode" / "gemma3" / "hf",
}
TITLES: Mapping[str, str] = {
    "smollm2": "SmolLM2-135M-Instruct, dequantized from Q4_1",
    "gemma3": "Gemma 3 270M, dequantized from Q4_K_M",
}
LINEARS = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)
"""The weights that are quantized, by their names in a decoder."""
GROUPS = (128, 64, 32)
"""Group sizes; halved where they do not divide the columns of a weight."""
BITS = (4, 3)
AUTOROUND_ITERATIONS = 50
"""Of AutoRound's own 200: what its "light" recipe has, with the learning rate of that recipe."""
PEERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "llmcompressor": (
        ("rtn", "none"),
        ("gptq", "same"),
        ("gptq", "foreign"),
        ("awq", "same"),
        ("awq", "foreign"),
    ),
    "torchao": (("hqq", "none"),),
    "gptqmodel": (("gptq", "same"), ("gptq", "foreign")),
    "autoround": (
        ("rtn", "none"),
        (f"light{AUTOROUND_ITERATIONS}", "same"),
        (f"light{AUTOROUND_ITERATIONS}", "foreign"),
    ),
}
"""Tool -> methods, each with the text that calibrates it."""
OWN = (("weights", "none"), ("auto", "none"), ("auto", "foreign"), ("auto", "same"))
"""The same of gracec; the method is `calibration.method` of a recipe."""
RUNTIMES = ("torchao-bfloat16", "onnx-faithful", "onnx-fast")
"""What also runs gracec's codes, on one model, at 4 bits and these groups."""
RUNTIME_GROUPS = (64, 128)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        protocol: "same", "foreign" or "none".
        runtime: what computes; "" is float32 with codes times scales.
    """

    model: str
    tool: str
    method: str
    protocol: str
    bits: int
    group_size: int
    runtime: str = ""

    @property
    def name(self) -> str:
        parts = [self.model, self.tool, self.method, self.protocol]
        parts += [f"w{self.bits}", f"g{self.group_size}", *([self.runtime] if self.runtime else [])]
        return "-".join(parts)


def cells() -> Iterator[Cell]:
    """All of them, the most telling first; what is slow comes last among its like."""
    grids = [(bits, group) for bits in BITS for group in GROUPS]
    blocks = [(model, bits, group) for bits, group in grids for model in MODELS]
    for model, bits, group in blocks:
        for method, protocol in OWN:
            yield Cell(model, "gracec", method, protocol, bits, group)
        for tool, runs in PEERS.items():
            for method, protocol in runs:
                yield Cell(model, tool, method, protocol, bits, group)
    yield Cell("smollm2", "gracec", "scales", "foreign", 4, 128)
    for group in RUNTIME_GROUPS:
        for runtime in RUNTIMES:
            yield Cell("smollm2", "gracec", "auto", "none", 4, group, runtime)


def fitting(group_size: int, columns: int) -> int:
    """The group, halved until it divides the columns."""
    while columns % group_size:
        group_size //= 2
    return group_size
