"""Fuzzing: inputs changed at random are accepted, or refused with one short line."""
