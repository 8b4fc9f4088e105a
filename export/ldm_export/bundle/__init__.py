"""Builds bundles from checkpoints stage by stage, calibrates, publishes and inspects them."""
