"""Names for what a user can choose about an original checkpoint. This needs no torch."""

from __future__ import annotations

__all__ = ["PREDICTION_TYPES", "WEIGHTS"]

WEIGHTS = ("ema", "model")
"""Weights of the UNet: the moving averages, or the plain weights."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
"""What a UNet predicts: noise, or velocity."""
