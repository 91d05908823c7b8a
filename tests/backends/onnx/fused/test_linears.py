"""What is joined, where its tensors lie, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from gracec.backends.onnx.fused.linears import fuse_linears, place_together, side_by_side
from gracec.backends.onnx.graphs import write_model
from gracec.backends.onnx.session import open_session
from gracec.errors import GracecError

FEATURES, BLOCK = 64, 32


def matmuls(bits: dict[str, int], biased: tuple[str, ...] = ()) -> ir.Model:
    """Linears of one input, by name and bits; rows differ."""
    rng = np.random.default_rng(0)
    x = ir.Value(
        name="x", shape=ir.Shape(("rows", FEATURES)), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="linears")

    def tensor(name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        graph.register_initializer(value)
        return value

    for place, (name, width) in enumerate(bits.items()):
        rows = 48 + 16 * place
        packed = rng.integers(0, 256, (rows, FEATURES // BLOCK, BLOCK * width // 8), np.uint8)
        codes = tensor(f"layer.{name}.weight.codes", packed)
        scales = tensor(f"layer.{name}.weight.scales", rng.random((rows, 2), np.float32))
        attributes = {"K": FEATURES, "N": rows, "bits": width, "block_size": BLOCK}
        attributes["accuracy_level"] = 1
        node = ir.node("MatMulNBits", [x, codes, scales], attributes, domain="com.microsoft")
        graph.append(node)
        if name in biased:
            bias = tensor(f"layer.{name}.bias", rng.random(rows, np.float32))
            node = ir.node("Add", [node.outputs[0], bias])
            graph.append(node)
        (output,) = node.outputs
        output.name, output.shape = f"y_{name}", ir.Shape(("rows", rows))
        output.type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(ir.node("Identity", [output]))
        last = graph[-1].outputs[0]
        last.name, last.shape, last.type = f"out_{name}", output.shape, output.type
        graph.outputs.append(last)
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((3, FEATURES), np.float32)
    return open_session(path, {}, threads=1).run(None, {"x": x})


@pytest.mark.parametrize("biased", [(), ("q", "k", "v")])
def test_q_k_and_v_are_one_range_of_the_file(tmp_path: Path, biased: tuple[str, ...]) -> None:
    model = matmuls({"q": 4, "k": 4, "other": 8, "v": 4}, biased)
    place_together(model.graph)
    standard, fused = tmp_path / "standard.onnx", tmp_path / "fused.onnx"
    write_model(model, standard, external=True)
    model = ir.load(standard)
    parts = {name: value.const_value for name, value in model.graph.initializers.items()}
    joined = fuse_linears(model.graph)
    name = "layer.q+k+v.weight"
    assert joined == {name: ("layer.q.weight", "layer.k.weight", "layer.v.weight")}
    ir.save(model, fused)
    codes = ir.load(fused).graph.initializers[f"{name}.codes"].const_value
    assert isinstance(codes, ir.ExternalTensor)
    assert (codes.location, codes.offset) == (
        "standard.onnx_data",
        parts["layer.q.weight.codes"].offset,
    )
    stacked = [parts[f"{fqn}.codes"].numpy() for fqn in joined[name]]
    assert np.array_equal(codes.numpy(), np.concatenate(stacked))
    matmul = next(node for node in model.graph if node.op_type == "MatMulNBits")
    assert (len(matmul.inputs) == 6) == bool(biased)
    for found, expected in zip(run(fused), run(standard), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_small_tensors_elsewhere_are_stored_again(tmp_path: Path) -> None:
    model = matmuls({"q": 4, "k": 4, "other": 8, "v": 4})
    standard, fused = tmp_path / "standard.onnx", tmp_path / "fused.onnx"
    write_model(model, standard, external=True)
    model = ir.load(standard)
    assert len(fuse_linears(model.graph)) == 1
    ir.save(model, fused)
    for found, expected in zip(run(fused), run(standard), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_other_layouts_are_not_joined() -> None:
    model = matmuls({"q": 4, "k": 8}, ())
    assert fuse_linears(model.graph) == {}
    model = matmuls({"gate": 4, "up": 4}, ("up",))
    assert fuse_linears(model.graph) == {}


def test_large_tensors_elsewhere_are_refused(tmp_path: Path) -> None:
    small = [ir.tensor(np.full((2, 3), value, np.uint8)) for value in (1, 2)]
    assert side_by_side(small, "w").numpy().tolist() == [[1] * 3] * 2 + [[2] * 3] * 2
    large = [ir.tensor(np.zeros((2, 1 << 15), np.uint8)) for _ in range(2)]
    with pytest.raises(GracecError, match="w: 2 tensors of 131,072 bytes do not lie next to each"):
        side_by_side(large, "w")
