"""Turns what a request asks for (text, class label, image, …) into the inputs of the denoiser."""
