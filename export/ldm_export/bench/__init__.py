"""Benchmarks: alternatives take turns, each in its own process."""
