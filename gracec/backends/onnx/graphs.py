"""From a serving graph to an ONNX file; equal graphs give equal bytes.

torch.onnx translates and optimizes. What is left to do here: codes that went through as bytes get
their 4-bit type, tensors get the names of the model's state dict, dimensions those of the serving
graph, and everything goes that says on which machine the file was made.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedOpsetsPass

from gracec._version import __version__
from gracec.backends.onnx.lift import lift
from gracec.backends.onnx.translate import PLACEHOLDER_DOMAIN, translations
from gracec.capture.serving import ServingProgram
from gracec.capture.serving_graph import Shape
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.kernels.onnxruntime import OPSET

EXTERNAL_ABOVE = 16 << 20
"""Bytes of tensors from which on they lie in a file of their own, beside the graph."""
EXTERNAL_FROM = 1 << 10
"""Bytes of the smallest tensor in that file."""


def to_onnx(serving: ServingProgram, name: str, *, decompose: bool = False) -> ir.Model:
    """Translate a serving graph whose weights are lowered.

    Args:
        name: of the graph, as it will be in the file.
        decompose: trace the graph once more, so that operators without a translation become ones
            with; a decoder needs none, and its trace takes long.

    Raises:
        GracecError: if torch.onnx cannot translate it.
    """
    program = serving.program
    try:
        with _quiet():
            exported = torch.onnx.export(
                program.reexport() if decompose else lift(program),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(serving.inputs),
                output_names=list(serving.outputs),
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:
        reason = next((line for line in _causes(error) if line), type(error).__name__)
        raise GracecError(f"torch.onnx cannot translate the graph: {reason}", where=name) from error
    assert exported is not None
    model = exported.model
    _name_tensors(model.graph, program)
    for node in list(model.graph):
        if node.domain == PLACEHOLDER_DOMAIN:
            _standard_dequantize(model.graph, node)
    _name_dimensions(model.graph, serving)
    ClearMetadataAndDocStringPass()(model)
    for node in model.graph:
        node.metadata_props.clear()
        ordered = sorted(node.attributes.values(), key=lambda attribute: attribute.name)
        node.attributes.clear()
        node.attributes.update({attribute.name: attribute for attribute in ordered})
    RemoveUnusedOpsetsPass()(model)
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    model.graph.name = name
    model.producer_name, model.producer_version = "gracec", __version__
    return model


def write_model(model: ir.Model, path: Path, *, external: bool = False) -> list[Path]:
    """Write a model, its tensors in `<path>_data` if they are large; the files written.

    Args:
        external: put them there however large they are, so that another graph can share them.
    """
    tensors = model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in tensors if value.const_value is not None)
    data = path.with_name(f"{path.name}_data")
    external = external or size > EXTERNAL_ABOVE
    ir.save(
        model,
        path,
        external_data=data.name if external else None,
        size_threshold_bytes=EXTERNAL_FROM,
    )
    files = [path, data] if external else [path]
    for file in files:
        file.chmod(0o644)
    return files


def _name_tensors(graph: ir.Graph, program: Program) -> None:
    """Initializers get the names that the tensors have in the model's state dict."""
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = program.fqn(value.name)
        if name != value.name and name not in graph.initializers:
            value.name = name
        if value.const_value is not None:
            value.const_value.name = value.name
        value.metadata_props.clear()


def _standard_dequantize(graph: ir.Graph, node: ir.Node) -> None:
    """gracec.DequantizeLinear(bytes, scales) -> DequantizeLinear(codes, scales) along axis 0, or
    along axis 1 where there is one scale for each output."""
    codes, scales = (_own(graph, value, node) for value in node.inputs)
    stored, rows = codes.const_value, scales.shape
    assert stored is not None and rows is not None
    if stored.dtype == ir.DataType.UINT8:  # two codes a byte, as ONNX lays them out
        packed = np.asarray(stored.numpy())
        shape = ir.Shape((len(packed), rows[-1]))
        codes.const_value = ir.PackedTensor(
            packed.reshape(-1), ir.DataType.INT4, shape=shape, name=codes.name
        )
        codes.shape, codes.type = shape, ir.TensorType(ir.DataType.INT4)
    node.domain = ""
    blocks = bool(node.attributes["block_size"].as_int())
    node.attributes["axis"] = ir.AttrInt64("axis", 0 if blocks else 1)
    if not blocks:
        del node.attributes["block_size"]
        _unsigned_if_wide(graph, node, codes)


def _unsigned_if_wide(graph: ir.Graph, node: ir.Node, codes: ir.Value) -> None:
    """Codes that need 8 bits as unsigned ones with the zero point 128: see `kernel`."""
    assert codes.const_value is not None
    stored = np.asarray(codes.const_value.numpy())
    if not needs_eight_bits(stored):
        return
    unsigned, offsets = unsigned_codes(stored)
    codes.const_value = ir.Tensor(unsigned, name=codes.name)
    codes.type = ir.TensorType(ir.DataType.UINT8)
    name = f"{str(codes.name).removesuffix('.codes')}.zero_points"
    zero_points = ir.Value(
        name=name,
        shape=ir.Shape(offsets.shape),
        type=ir.TensorType(ir.DataType.UINT8),
        const_value=ir.Tensor(offsets, name=name),
    )
    graph.register_initializer(zero_points)
    node.resize_inputs(3)
    node.replace_input_with(2, zero_points)


def needs_eight_bits(codes: np.ndarray) -> bool:
    """Whether signed codes are beyond 7 bits."""
    return bool(codes.min() < -64 or codes.max() > 63)


def unsigned_codes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [K, N] -> uint8 [K, N] and its zero points uint8 [N], for the same values."""
    return (codes.astype(np.int16) + 128).astype(np.uint8), np.full(codes.shape[1], 128, np.uint8)


def _own(graph: ir.Graph, value: ir.Value | None, node: ir.Node) -> ir.Value:
    """The initializer itself, or a copy for this node if others use it as well."""
    assert value is not None and value.const_value is not None
    if len(value.uses()) == 1:
        return value
    number = sum(str(name).startswith(f"{value.name}.") for name in graph.initializers)
    copy = ir.Value(
        name=f"{value.name}.{number + 1}",
        shape=value.shape,
        type=value.type,
        const_value=value.const_value,
    )
    graph.register_initializer(copy)
    node.replace_input_with(list(node.inputs).index(value), copy)
    return copy


def _name_dimensions(graph: ir.Graph, serving: ServingProgram) -> None:
    """Shapes of inputs and outputs as the serving graph names them, none of what is between.

    Inner shapes would carry torch's symbols; runtimes infer their own.
    """
    for values, shapes in ((graph.inputs, serving.inputs), (graph.outputs, serving.outputs)):
        for value, (name, shape) in zip(values, shapes.items(), strict=True):
            if value.name != name:
                raise GracecError(f"{name} came out as {value.name}", where=str(graph.name))
            value.shape = _shape(shape)
    ends = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph:
        for value in node.outputs:
            if value not in ends:
                value.shape = value.type = None


def _shape(shape: Shape) -> ir.Shape:
    return ir.Shape(shape)


def _causes(error: BaseException) -> Iterator[str]:
    """First lines of an error and of what caused it, the root first."""
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
    yield next(iter(str(error).strip().splitlines()), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx says what it does to itself, and that torchvision is not there."""
    logger: Any = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)
