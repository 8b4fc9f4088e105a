"""Timings of what takes turns, each in a process of its own."""
