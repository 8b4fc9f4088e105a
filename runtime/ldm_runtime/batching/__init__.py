"""Continuous batching: a queue, the active batches, their limits and counters. No server is needed."""
