"""The fused decoder of the tiny LLaVA: what it is made of, and what it is held to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import gracec
from gracec.backends.onnx.fused import decoder
from gracec.backends.onnx.fused.attention import fuse_attentions
from gracec.backends.onnx.fused.decoder import evaluate, write_fused
from gracec.errors import GateError, GracecError
from gracec.models.loading import load_config

STANDARD, FUSED = "decoder_model_merged_q4.onnx", "fused_decoder.onnx"
KERNELS = {"MatMulNBits": 14}


def text(graph: ir.Graph) -> str:
    """A line for each node, with names as short as they can be told apart."""
    prefix = "model.language_model."

    def name(value: ir.Value | None) -> str:
        return "" if value is None else str(value.name).removeprefix(prefix)

    lines = []
    for node in graph:
        attributes = ", ".join(
            f"{a.name}={a.value:g}" for a in node.attributes.values() if a.name != "to"
        )
        inputs, outputs = (", ".join(map(name, ends)) for ends in (node.inputs, node.outputs))
        lines.append(f"{outputs} = {node.op_type}({inputs}) {{{attributes}}}\n")
    return "".join(lines)


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the graphs, without the fused one."""
    copy = Path(shutil.copytree(bundle / "onnx", tmp_path / "onnx"))
    (copy / FUSED).unlink()
    return copy


@pytest.fixture
def write(bundle: Path, folder: Path) -> Callable[[], Any]:
    def fused() -> Any:
        weights = gracec.load(bundle, target="torchao").weights
        return write_fused(folder / STANDARD, load_config(bundle), weights, "fast", KERNELS)

    return fused


def test_the_graph_is_as_written_down(bundle: Path, golden: Callable[..., None]) -> None:
    graph = ir.load(bundle / "onnx" / FUSED).graph
    golden("onnx/fused-decoder.txt", text(graph), made_by="fused decoder", after="lower-qdq")


def test_no_tensor_is_stored_twice(bundle: Path) -> None:
    """What is too small for the file of tensors is stored again, and so is what is beside it."""
    graph = ir.load(bundle / "onnx" / FUSED).graph
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    files = [one for one in tensors.values() if isinstance(one, ir.ExternalTensor)]
    assert {one.location for one in files} == {f"{STANDARD}_data"}
    assert sum(one.nbytes for one in files) > 55_000
    again = [n for n, t in tensors.items() if t not in files and not n.endswith("_table")]
    assert sum(tensors[name].nbytes for name in again) < 17_000


def test_it_is_made_again_with_the_same_bytes(
    bundle: Path, folder: Path, write: Callable[[], Any]
) -> None:
    assert write().kernels == 8
    assert (folder / FUSED).read_bytes() == (bundle / "onnx" / FUSED).read_bytes()


def test_other_codes_are_an_error(folder: Path, write: Callable[[], Any]) -> None:
    data = folder / f"{STANDARD}_data"
    name = "model.language_model.layers.1.mlp.up_proj.weight.codes"
    codes = ir.load(folder / STANDARD).graph.initializers[name].const_value
    assert isinstance(codes, ir.ExternalTensor)
    changed = bytearray(data.read_bytes())
    changed[codes.offset] ^= 1
    data.write_bytes(changed)
    with pytest.raises(GateError, match=r"1\.mlp\.up_proj\.weight reads back other than codes"):
        write()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask[..., ::-1], "the attention is not to all positions before"),
        (
            lambda mask: mask * (np.arange(mask.shape[-1]) > mask.shape[-1] - 9),
            "not to all positions",
        ),
    ],
    ids=["another mask", "a window"],
)
def test_another_mask_is_refused(
    folder: Path,
    write: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    def changed(*arguments: Any) -> list[np.ndarray]:
        return [change(array) for array in evaluate(*arguments)]

    monkeypatch.setattr(decoder, "evaluate", changed)
    with pytest.raises(GracecError, match=message):
        write()
    assert not (folder / FUSED).exists()


def test_attentions_of_another_form_are_refused(folder: Path) -> None:
    graph = ir.load(folder / STANDARD).graph
    attention = next(node for node in graph if node.op_type == "Attention")
    attention.op_type = "Attention24"
    with pytest.raises(GracecError, match="1 of 2 attentions are one operator with their cache"):
        fuse_attentions(graph, lambda *arguments: [], 8)
    attention.op_type = "Attention"
    rotary = next(node for node in graph if node.op_type == "RotaryEmbedding")
    rotary.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    with pytest.raises(GracecError, match="only a part of each head is turned"):
        fuse_attentions(
            graph, lambda names, past, length: evaluate(folder / STANDARD, names, past, length), 8
        )
