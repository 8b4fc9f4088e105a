"""A bundle: built stage by stage from a checkpoint, calibrated, put in its place, and looked into."""
