"""Weights in int8: symmetric, one scale for each output channel."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.observers import LEVELS


def weights_of(value: ir.Value) -> NDArray[np.float32]:
    """A copy of an initialiser's values; the file they come from, if any, is read and closed."""
    tensor = value.const_value
    assert tensor is not None
    return _read(tensor).numpy() if isinstance(tensor, ir.ExternalTensor) else np.array(tensor.numpy())


def read_when_used(model: ir.Model) -> None:
    """Have external weights read from their file, each when it is used, in place of mapping the whole file.

    onnx-ir refuses to map a file with several hard links, as those that a bundle's stages keep have.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.LazyTensor(
                partial(_read, tensor), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name
            )


def _read(tensor: ir.ExternalTensor) -> ir.Tensor:
    array = np.fromfile(tensor.path, tensor.dtype.numpy(), int(tensor.size), offset=tensor.offset or 0)
    return ir.Tensor(array.reshape(tensor.shape.numpy()), dtype=tensor.dtype, name=tensor.name)


def quantize_weights(weights: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights float32 → int8 of the same shape in -127 … 127, and float32 scales, one for each slice along ``axis``.

    A slice of zeros has scale 1.
    """
    others = tuple(i for i in range(weights.ndim) if i != axis)
    largest = np.abs(weights).max(others, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(weights / scales), -LEVELS, LEVELS).astype(np.int8), scales.reshape(-1)


def migration_factors(
    activations: NDArray[np.float32], weights: NDArray[np.float32], exponent: float
) -> NDArray[np.float32]:
    """What each input channel's activations are divided by and its weights multiplied with, float32 [channels].

    SmoothQuant, arXiv 2211.10438 equation 4: max|X|^α / max|W|^(1-α), here with a geometric mean of 1.

    Args:
        activations: largest magnitude of each input channel.
        weights: the same of the weights that read it.
        exponent: α in [0, 1]; 0 gives factors that leave the activations as they are.
    """
    if not exponent:
        return np.ones_like(activations)
    floor = np.float32(1e-5)
    x = np.maximum(activations, floor * max(float(activations.max()), 1e-30))
    w = np.maximum(weights, floor * max(float(weights.max()), 1e-30))
    logs = exponent * np.log(x.astype(np.float64)) - (1 - exponent) * np.log(w.astype(np.float64))
    return np.exp(np.clip(logs - logs.mean(), -8, 8)).astype(np.float32)
