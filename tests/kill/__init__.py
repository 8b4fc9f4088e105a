"""Commands that are killed at each call that changes a file."""
