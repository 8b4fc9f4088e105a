"""Serves a bundle with Triton Inference Server: the model repository and a client."""
