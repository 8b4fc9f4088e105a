"""Runs bundles of latent diffusion models: NumPy and an inference engine, no torch."""

from ldm_runtime import telemetry
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError
from ldm_runtime.pipeline import Generation, LatentDiffusionPipeline, Step
from ldm_runtime.request import Request

telemetry.disable_reports()  # before an engine is imported

__all__ = ["Bundle", "Generation", "LatentDiffusionPipeline", "LdmError", "Request", "Step"]
