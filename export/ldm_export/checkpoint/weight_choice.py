"""Names for the choice of a training checkpoint's UNet weights: moving averages or plain. This needs no torch."""

from __future__ import annotations

__all__ = ["WEIGHTS"]

WEIGHTS = ("ema", "model")
"""The moving averages, or the plain weights."""
