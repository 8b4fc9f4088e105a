"""ONNX graphs: tracing of a checkpoint's modules, splitting into components, and rewrites for engines."""
