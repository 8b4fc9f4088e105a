"""Reads checkpoint folders: checks components, reads weights, fills torch modules and converts tokenizers."""
