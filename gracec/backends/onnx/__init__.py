"""ONNX: codes as ONNX Runtime reads them, graphs, their gates, and the runner."""
