"""Batches requests in flight: a queue, the running batches, limits and counters. No server is needed."""
