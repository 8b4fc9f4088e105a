"""A bundle on a Triton server: its model repository, and a client."""
