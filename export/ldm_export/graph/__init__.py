"""ONNX graphs: traced from a checkpoint's modules, and rewritten in half precision."""
