"""Exports latent diffusion models to ONNX and TensorRT, and measures and serves the exported bundles."""

from __future__ import annotations

__all__: list[str] = []


def __getattr__(name: str) -> str:
    """``__version__``: the version of the installed distribution ldm-export; looked up on first use, not on import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ldm-export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
