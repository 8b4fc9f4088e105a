"""Builds TensorRT engines from ONNX graphs, and proves the precision in which they compute."""
