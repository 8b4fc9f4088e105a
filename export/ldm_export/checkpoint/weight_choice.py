"""Choice of the UNet weights of a training checkpoint, moving averages or plain ones. Importing this needs no torch."""

from __future__ import annotations

__all__ = ["WEIGHTS"]

WEIGHTS = ("ema", "model")
"""The moving averages, or the plain weights."""
