"""Measures how close the results of a bundle are to a reference."""
