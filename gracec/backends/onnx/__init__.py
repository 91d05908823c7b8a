"""ONNX graphs: written from codes, checked, and run by ONNX Runtime."""

from gracec.backends.onnx.format import Onnx

__all__ = ["Onnx"]
