"""TensorRT engines: requests, builds from graphs, and proofs of their precision."""
