"""Calibrates latent diffusion models for int8: observes ranges, chooses layers and writes Q/DQ graphs."""

__all__: list[str] = []
