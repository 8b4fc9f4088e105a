"""Reads checkpoint folders: checks configs, reads weights into torch modules, and converts tokenizers."""
