"""The DDIM step as a graph of its own, so that a denoising loop can stay on the device between two UNet calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ldm_export.graph.onnx_graph import OPSET
from ldm_runtime.device_loop import GUIDED_STEP, STEP
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec


def step_spec(unet: ComponentSpec, guided: bool) -> ComponentSpec:
    """What one step takes and gives, from the UNet's spec.

    Inputs ``sample`` float32 [R, C, h, w], the latents (with guidance twice, one below the other: R = 2B, else R = B),
    ``noise_pred`` of the UNet in the same shape (with guidance the unguided rows first), ``noise`` [B, C, h, w],
    ``coefficients`` [B, 4]: a, b, c of ``Schedule.rows`` and the guidance scale, for each sample its own.
    Output ``next_sample`` [R, C, h, w], what the UNet takes next.
    """
    _, channels, height, width = unet.inputs[0].shape
    rows = unet.inputs[0].shape[0]
    assert isinstance(rows, Axis)
    images = Axis("images", 1, max(1, rows.opt // 2), max(1, rows.max // 2)) if guided else rows
    doubled = images * 2 if guided else images
    tall = (doubled, channels, height, width)
    return ComponentSpec(
        GUIDED_STEP if guided else STEP,
        (
            TensorSpec("sample", "float32", tall),
            TensorSpec("noise_pred", "float32", tall),
            TensorSpec("noise", "float32", (images, channels, height, width)),
            TensorSpec("coefficients", "float32", (images, 4)),
        ),
        (TensorSpec("next_sample", "float32", tall),),
    )


def step_specs(unet: ComponentSpec) -> dict[str, ComponentSpec]:
    """Component → spec of the steps without and with guidance."""
    return {spec.name: spec for spec in (step_spec(unet, False), step_spec(unet, True))}


def export_step(spec: ComponentSpec, target: Path) -> list[Path]:
    """Write the graph of a ``step_spec`` to ``target``: x_prev = a·x + b·prediction + c·noise, in this order.

    Returns:
        The file written.
    """
    guided = spec.outputs[0].shape[0] != spec.inputs[2].shape[0]
    nodes = [
        helper.make_node("Unsqueeze", ["coefficients", "image_axes"], ["broadcast"], name="broadcast"),
        helper.make_node("Split", ["broadcast"], ["a", "b", "c", "scale"], name="coefficients", axis=1, num_outputs=4),
    ]
    latents, prediction = "sample", "noise_pred"
    if guided:
        latents, prediction = "latents", "predicted"
        nodes += [
            helper.make_node("Split", ["sample"], ["latents", "copy"], name="halve", axis=0, num_outputs=2),
            helper.make_node("Split", ["noise_pred"], ["unguided", "prompted"], name="rows", axis=0, num_outputs=2),
            helper.make_node("Sub", ["prompted", "unguided"], ["towards"], name="guidance/Sub"),
            helper.make_node("Mul", ["scale", "towards"], ["scaled"], name="guidance/Mul"),
            helper.make_node("Add", ["unguided", "scaled"], ["predicted"], name="guidance/Add"),
        ]
    moved = "moved" if guided else "next_sample"
    nodes += [
        helper.make_node("Mul", ["a", latents], ["kept"], name="a/Mul"),
        helper.make_node("Mul", ["b", prediction], ["turned"], name="b/Mul"),
        helper.make_node("Add", ["kept", "turned"], ["mean"], name="mean/Add"),
        helper.make_node("Mul", ["c", "noise"], ["spread"], name="c/Mul"),
        helper.make_node("Add", ["mean", "spread"], [moved], name="noise/Add"),
    ]
    if guided:
        nodes.append(helper.make_node("Concat", [moved, moved], ["next_sample"], name="double", axis=0))
    graph = helper.make_graph(
        nodes,
        spec.name,
        [_value(tensor) for tensor in spec.inputs],
        [_value(tensor) for tensor in spec.outputs],
        [numpy_helper.from_array(np.array([2, 3], np.int64), "image_axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="ldm-export")
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    target.write_bytes(model.SerializeToString(deterministic=True))
    return [target]


def _value(tensor: TensorSpec) -> onnx.ValueInfoProto:
    shape = [dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)
