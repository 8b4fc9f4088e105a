"""The scheduler's step as a graph, so that a denoising loop on a device does not need the host between UNet calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ldm_export.graph.onnx_graph import OPSET
from ldm_runtime.device_loop import GUIDED_STEP, STEP, slots_of
from ldm_runtime.device_run import COEFFICIENTS, HISTORY, NEXT_HISTORY, NEXT_SAMPLE, NOISE
from ldm_runtime.errors import BuildError
from ldm_runtime.model import NOISE_PRED, SAMPLE
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

__all__ = ["export_step", "step_specs"]


def step_specs(unet: ComponentSpec, slots: int, branches: int) -> dict[str, ComponentSpec]:
    """Specs of the step components of a model: "step", and "guided_step" for a model with guidance.

    Inputs: ``sample`` float32 [R, C, h, w], the latents (R = B, or with guidance 2·B: the latents twice);
    ``noise_pred`` [R, C, h, w] of the UNet, with guidance the unconditional rows first; ``noise`` [B, C, h, w];
    ``coefficients`` [B, slots · (slots + 2) + 1] of each image (``device_run.coefficients``); with more than one slot
    ``history`` [B, (slots - 1)·C, h, w], the other slots of the state side by side.
    Outputs: ``next_sample`` [R, C, h, w], the UNet's next input, and with more than one slot ``next_history``.

    Args:
        unet: Spec of the UNet.
        slots: Slots of the state, ``Trajectory.slots`` of the model's scheduler.
        branches: Guidance branches of the model: 2, or at most 1 without guidance.

    Raises:
        BuildError: The model has more than two branches.
    """
    if branches > 2:
        raise BuildError(f"{GUIDED_STEP}: got {branches} guidance branches, expected 0, 1 or 2; leave the steps out")
    specs = [_step_spec(unet, slots, guided) for guided in ((False, True) if branches == 2 else (False,))]
    return {spec.name: spec for spec in specs}


def _step_spec(unet: ComponentSpec, slots: int, guided: bool) -> ComponentSpec:
    _, _, height, width = unet.inputs[0].shape
    rows, channels = unet.inputs[0].shape[0], unet.outputs[0].shape[1]
    assert isinstance(rows, Axis) and isinstance(channels, int)
    images = Axis("images", 1, max(1, rows.opt // 2), max(1, rows.max // 2)) if guided else rows
    state = (images * 2 if guided else images, channels, height, width)
    history = (images, (slots - 1) * channels, height, width)
    inputs = [
        TensorSpec(SAMPLE, "float32", state),
        TensorSpec(NOISE_PRED, "float32", state),
        TensorSpec(NOISE, "float32", (images, channels, height, width)),
        TensorSpec(COEFFICIENTS, "float32", (images, slots * (slots + 2) + 1)),
    ]
    outputs = [TensorSpec(NEXT_SAMPLE, "float32", state)]
    if slots > 1:
        inputs.append(TensorSpec(HISTORY, "float32", history))
        outputs.append(TensorSpec(NEXT_HISTORY, "float32", history))
    return ComponentSpec(GUIDED_STEP if guided else STEP, tuple(inputs), tuple(outputs), runs="step")


def export_step(spec: ComponentSpec, target: Path) -> list[Path]:
    """Write the graph of a step component: guidance, then ``Trajectory.step`` for each image.

    Terms are added in the order of ``Trajectory.step``; a term whose coefficient is zero adds zero.

    Args:
        spec: One of ``step_specs``.
        target: File to write.

    Returns:
        The files written.
    """
    slots = slots_of(spec)
    names = [f"coefficient_{index}" for index in range(slots * (slots + 2))]
    nodes = [
        helper.make_node("Unsqueeze", [COEFFICIENTS, "image_axes"], ["broadcast"], name="broadcast"),
        _split("broadcast", [*names, "scale"], "coefficients", axis=1),
    ]
    latents, prediction, moved = SAMPLE, NOISE_PRED, NEXT_SAMPLE
    if guided := spec.name == GUIDED_STEP:
        latents, prediction, moved = "latents", "predicted", "moved"
        nodes += [
            _split(SAMPLE, ["latents", "copy"], "halves", axis=0),
            _split(NOISE_PRED, ["unconditional", "conditional"], "rows", axis=0),
            helper.make_node("Sub", ["conditional", "unconditional"], ["direction"], name="guidance/Sub"),
            helper.make_node("Mul", ["scale", "direction"], ["scaled"], name="guidance/Mul"),
            helper.make_node("Add", ["unconditional", "scaled"], ["predicted"], name="guidance/Add"),
        ]
    old, new = [f"history_{slot}" for slot in range(1, slots)], [f"next_{slot}" for slot in range(1, slots)]
    if slots == 2:
        old, new = [HISTORY], [NEXT_HISTORY]
    elif slots > 2:
        nodes.append(_split(HISTORY, old, "history", axis=1))
    terms = [latents, *old, prediction, NOISE]
    for slot, result in enumerate([moved, *new]):
        nodes += _weighted_sum(names[slot * (slots + 2) :][: slots + 2], terms, result, f"slot_{slot}")
    if slots > 2:
        nodes.append(helper.make_node("Concat", new, [NEXT_HISTORY], name="next_history", axis=1))
    if guided:
        nodes.append(helper.make_node("Concat", [moved, moved], [NEXT_SAMPLE], name="double", axis=0))
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


def _split(tensor: str, parts: Sequence[str], name: str, axis: int) -> NodeProto:
    return helper.make_node("Split", [tensor], list(parts), name=name, axis=axis, num_outputs=len(parts))


def _weighted_sum(weights: Sequence[str], terms: Sequence[str], result: str, name: str) -> list[NodeProto]:
    """``result`` = sum of weight · term, added from the first to the last."""
    nodes, total = [], ""
    for index, (weight, term) in enumerate(zip(weights, terms, strict=True)):
        product = f"{name}/product_{index}"
        nodes.append(helper.make_node("Mul", [weight, term], [product], name=f"{name}/Mul_{index}"))
        if index:
            following = result if index + 1 == len(terms) else f"{name}/sum_{index}"
            nodes.append(helper.make_node("Add", [total, product], [following], name=f"{name}/Add_{index}"))
            total = following
        else:
            total = product
    return nodes


def _value(tensor: TensorSpec) -> onnx.ValueInfoProto:
    shape = [dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)
