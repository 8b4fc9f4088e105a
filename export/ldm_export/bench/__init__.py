"""Benchmarks: times alternatives in turns, each in its own process."""
