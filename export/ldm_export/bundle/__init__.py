"""Builds bundles from checkpoints in stages, and calibrates, publishes and inspects them."""
