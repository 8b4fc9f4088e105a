"""Runs bundles of latent diffusion models: NumPy and an inference engine, no torch."""

from ldm_runtime import telemetry
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError
from ldm_runtime.generation import Generation, Step
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request

telemetry.disable_reports()  # before an engine is imported

__all__ = ["Bundle", "Generation", "LatentDiffusionPipeline", "LdmError", "Request", "Step"]


def __getattr__(name: str) -> str:
    """``__version__``: the version of the installed distribution ldm-export; looked up on first use, not on import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ldm-export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
