"""Fuses nearest-neighbour 2× upsampling and a 3×3 convolution into four 2×2 convolutions and a depth-to-space.

Upsampling repeats every value. The nine products of the convolution therefore read only four distinct values, and
weights that multiply the same value can be added in advance. This leaves 4/9 of the multiplications. The sums of
weights are rounded once more, so results agree up to rounding. The fusion is only used for bf16 arithmetic, which
rounds much more.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["fold_upsampling", "quarters"]

F32 = NDArray[np.float32]
MIN_PIXELS = 64
"""Smallest height × width for which four convolutions are faster than one."""
NEAREST = {("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")}
"""Coordinate and rounding modes that repeat every value when a size is doubled."""


def fold_upsampling(model: Any) -> int:
    """Fuse every pair of upsampling and convolution in a graph of fixed shapes; return the number of pairs."""
    folded = 0
    for convolution in model.get_ordered_ops():
        if convolution.get_type_name() == "Convolution" and _is_pair(convolution):
            _replace(convolution)
            folded += 1
    return folded


def quarters(weights: F32) -> dict[tuple[int, int], F32]:
    """Add up weights float32 [O, I, 3, 3] that multiply the same value: (row parity, column parity) -> [O, I, 2, 2]."""
    rows = {
        0: np.stack([weights[:, :, 0], weights[:, :, 1] + weights[:, :, 2]], 2),
        1: np.stack([weights[:, :, 0] + weights[:, :, 1], weights[:, :, 2]], 2),
    }
    columns = {
        0: lambda half: np.stack([half[..., 0], half[..., 1] + half[..., 2]], -1),
        1: lambda half: np.stack([half[..., 0] + half[..., 1], half[..., 2]], -1),
    }
    return {(p, q): np.ascontiguousarray(columns[q](rows[p])) for p, q in product((0, 1), repeat=2)}


def _is_pair(convolution: Any) -> bool:
    resize, weights = (port.get_source_output().get_node() for port in convolution.inputs())
    if resize.get_type_name() != "Interpolate" or weights.get_type_name() != "Constant":
        return False
    small, large = resize.input(0).get_partial_shape(), resize.output(0).get_partial_shape()
    if small.is_dynamic or large.is_dynamic or len(resize.output(0).get_target_inputs()) != 1:
        return False
    (batch, channels, height, width), doubled = small.to_shape(), list(large.to_shape())
    resizing, convolving = resize.get_attributes(), convolution.get_attributes()
    return (
        doubled == [batch, channels, 2 * height, 2 * width]
        and height * width >= MIN_PIXELS
        and resizing["mode"] == "nearest"
        and (resizing["coordinate_transformation_mode"], resizing["nearest_mode"]) in NEAREST
        and not any(resizing["pads_begin"])
        and not any(resizing["pads_end"])
        and list(weights.get_output_shape(0))[2:] == [3, 3]
        and weights.get_element_type().to_dtype() == np.float32
        and [list(convolving[name]) for name in ("strides", "dilations", "pads_begin", "pads_end")] == [[1, 1]] * 4
        and convolving["auto_pad"] == "explicit"
    )


def _replace(convolution: Any) -> None:
    from openvino import opset13 as ops

    source = convolution.input_value(0).get_node().input_value(0)
    weights = convolution.input_value(1).get_node().data
    parts = [
        ops.convolution(source, ops.constant(part), [1, 1], [1 - p, 1 - q], [p, q], [1, 1])
        for (p, q), part in quarters(weights).items()
    ]
    whole = ops.depth_to_space(ops.concat(parts, 1), "blocks_first", 2)
    for use in list(convolution.output(0).get_target_inputs()):
        use.replace_source_output(whole.output(0))
