"""Measured settings, written down instead of measured, for tests of what a budget takes."""

from __future__ import annotations

from ldm_runtime.quality import QualityRecord, QualityResult, QualitySetting

__all__ = ["CLOSE", "FAR", "NOT_LOADED", "record_of"]

CLOSE = QualityResult(QualitySetting("fp32", 6, guidance_every=2), 0.5, 45.0, 40.0)
FAR = QualityResult(QualitySetting("fp32", 4), 0.2, 30.0, 20.0)
NOT_LOADED = QualityResult(QualitySetting("int8", 2), 0.1, 60.0, 50.0)
"""The fastest and best of all, in a precision that the tests do not load."""


def record_of(steps: int) -> QualityRecord:
    """A record for a model of this number of steps."""
    reference = QualityResult(QualitySetting("fp32", steps), 1.0, None, None)
    return QualityRecord((reference, CLOSE, FAR, NOT_LOADED), 16, {"fp32": "onnxruntime on cpu"})
