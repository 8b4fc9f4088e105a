"""TensorRT engines: asked for, built from graphs, and their precision proven."""
