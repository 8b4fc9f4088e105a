"""A doubled picture and a 3×3 convolution of it as four 2×2 convolutions of the picture itself, for OpenVINO.

Nearest-neighbour doubling repeats every value, so of the nine products of a 3×3 convolution those that meet the same
value can have their weights added beforehand: four products are left, and 4/9 of the work. The sums of weights are
rounded once more than the weights were: the same up to rounding, so it is done where arithmetic rounds to bf16 anyway.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
LEAST = 64
"""Smallest height × width for which four convolutions are faster than one."""
NEAREST = {("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")}
"""Coordinates and rounding that repeat every value where a size is doubled."""


def fold_upsampling(model: Any) -> int:
    """Replace such pairs in a graph of fixed shapes; returns how many."""
    folded = 0
    for convolution in model.get_ordered_ops():
        if convolution.get_type_name() == "Convolution" and _is_pair(convolution):
            _replace(convolution)
            folded += 1
    return folded


def quarters(weights: F32) -> dict[tuple[int, int], F32]:
    """Weights [O, I, 3, 3] of a convolution of doubled values → for each parity of row and column [O, I, 2, 2]."""
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
    (rows, images, height, width), doubled = small.to_shape(), list(large.to_shape())
    made, given = resize.get_attributes(), convolution.get_attributes()
    return (
        doubled == [rows, images, 2 * height, 2 * width]
        and height * width >= LEAST
        and made["mode"] == "nearest"
        and (made["coordinate_transformation_mode"], made["nearest_mode"]) in NEAREST
        and not any(made["pads_begin"])
        and not any(made["pads_end"])
        and list(weights.get_output_shape(0))[2:] == [3, 3]
        and weights.get_element_type().to_dtype() == np.float32
        and [list(given[name]) for name in ("strides", "dilations", "pads_begin", "pads_end")] == [[1, 1]] * 4
        and given["auto_pad"] == "explicit"
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
