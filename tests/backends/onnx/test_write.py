"""write_graph looks at the file that it wrote: what was broken on the way to it is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from gracec.backends.onnx import gates, graphs, write
from gracec.backends.onnx.write import WrittenGraph, write_graph
from gracec.capture.module import with_shapes
from gracec.errors import GateError
from gracec.kernels import onnxruntime as kernel
from gracec.passes.lower_qdq import lowered_weights
from tests.frozen_graphs import linear_graph

OPS = kernel.OPS


def written(folder: Path, ops: str) -> WrittenGraph:
    """One linear with codes."""
    graph, path = with_shapes(linear_graph()), folder / "net.onnx"
    return write_graph(graph, "net", lambda kinds: path, ops=ops, mode="faithful", strict=True)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """breaking(edit): what is written is edited on the way."""
    write_model = graphs.write_model

    def install(edit: Callable[[Any], None]) -> None:
        def broken(model: Any, path: Path, **options: Any) -> list[Path]:
            files = write_model(model, path, **options)
            proto = onnx.load(str(path))
            edit(proto.graph)
            onnx.save(proto, str(path))
            return files

        monkeypatch.setattr(graphs, "write_model", broken)

    return install


@pytest.mark.parametrize("ops", OPS)
def test_what_was_found(tmp_path: Path, ops: str) -> None:
    found = written(tmp_path, ops)
    assert found.files == (tmp_path / "net.onnx",)
    assert (found.kernels, found.equal_weights, len(found.lowered)) == (1, 1, 1)
    assert [str(note) for note in found.notes] == ["lower-qdq: 1 weights run on INT4 kernels"]


@pytest.mark.parametrize("ops", OPS)
def test_a_file_that_is_not_valid_is_an_error(
    tmp_path: Path, ops: str, breaking: Callable[[Callable[[Any], None]], None]
) -> None:
    def misspell(graph: Any) -> None:
        node = next(node for node in graph.node if node.op_type == "Add")
        node.op_type = "Addd"

    breaking(misspell)
    with pytest.raises(GateError, match=r"net\.onnx: not valid ONNX"):
        written(tmp_path, ops)


@pytest.mark.parametrize("ops", OPS)
def test_a_matmul_that_runs_on_no_kernel_is_an_error(
    tmp_path: Path, ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(program: Any) -> dict[str, Any]:
        found = lowered_weights(program)
        return {**found, "another": found["weight"]}

    monkeypatch.setattr(write, "lowered_weights", one_more)
    with pytest.raises(GateError, match="1 matmuls run on the INT4 kernel, 2 are planned"):
        written(tmp_path, ops)


@pytest.mark.parametrize("ops", OPS)
def test_a_code_that_is_another_in_the_file_is_an_error(
    tmp_path: Path, ops: str, breaking: Callable[[Callable[[Any], None]], None]
) -> None:
    def flip(graph: Any) -> None:
        (codes,) = (tensor for tensor in graph.initializer if tensor.name.endswith(".codes"))
        codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]

    breaking(flip)
    with pytest.raises(GateError, match="weight reads back other than codes times scales"):
        written(tmp_path, ops)


def test_a_weight_that_is_not_found_in_the_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "stored_weights", lambda path: iter(()))
    with pytest.raises(GateError, match="net: not all of 1 quantized weights read back"):
        written(tmp_path, "qdq")
