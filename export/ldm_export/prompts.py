"""Prompts to measure with where none are given."""

PROMPTS = (
    "a large red circle in the center on a white background",
    "a small blue triangle at the top left on a yellow background",
    "a small green square left of a large purple cross on a gray background",
    "a large orange triangle above a small blue circle on a black background",
)
"""Sentences of the shipped model's grammar; any model takes them."""
