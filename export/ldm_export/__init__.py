"""Exports latent diffusion models to ONNX and TensorRT, and the command line."""

__all__: list[str] = []
