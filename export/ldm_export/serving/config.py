"""The config.pbtxt of each model of a Triton repository, from the components' own specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm_export.serving.pbtxt import Enum, MapOf
from ldm_runtime.engine_facts import Engine
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec
from ldm_runtime.triton.parameters import Settings
from ldm_runtime.triton.tensors import INPUTS, OUTPUTS, STREAM_INPUTS, STREAM_OUTPUTS, TensorField

TARGETS = ("python", "onnxruntime", "tensorrt")
"""What runs the separate components: our runtime in Triton's python backend, or Triton's own backends."""
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
DATA_TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "uint8": "UINT8"}
QUEUE = 256
"""Requests that may wait before one component."""
DELAY = 0
"""Microseconds that a request waits for others to share its call. A denoising loop would pay it at every step."""


@dataclass(frozen=True)
class Serving:
    """How a bundle is served: what runs the components, on what, and the settings of the python backend."""

    target: str
    gpu: bool
    settings: Settings


def component_config(spec: ComponentSpec, serving: Serving, engines: Sequence[Engine] = ()) -> dict[str, Any]:
    """The config of a component alone: its batch is Triton's, its other axes are as in the spec or the engine.

    Args:
        spec: of the component; the first axis of every tensor is the batch.
        serving: how.
        engines: of target "tensorrt", one for each compute capability.
    """
    most = _most(spec, engines)
    named: dict[str, Any] = {"name": spec.name}
    if serving.target == "python":
        settings = replace(serving.settings, component=spec.name)
        named |= {"backend": "python", "parameters": MapOf(settings.parameters())}
    else:
        named |= {"platform": PLATFORMS[serving.target]}
    if serving.target == "tensorrt":
        named["default_model_filename"] = plan_name(engines[0])
        named["cc_model_filenames"] = MapOf(
            {capability: plan_name(engine) for engine in engines for capability in engine.compute_capabilities}
        )
    return {
        **named,
        "max_batch_size": most,
        "input": [_tensor(tensor) for tensor in spec.inputs],
        "output": [_tensor(tensor) for tensor in spec.outputs],
        "dynamic_batching": {
            "max_queue_delay_microseconds": DELAY,
            "default_queue_policy": {"allow_timeout_override": True, "max_queue_size": QUEUE},
        },
        **_placed(serving.gpu),
        "optimization": _optimization(serving),
        "model_warmup": [_warmup(spec)],
        **_versions(),
    }


def room_config(serving: Serving) -> dict[str, Any]:
    """The config of `ldm_stream`, which batches requests itself and answers each step."""
    return {
        "name": "ldm_stream",
        "backend": "python",
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        **_wired(STREAM_INPUTS, STREAM_OUTPUTS),
        "parameters": MapOf(serving.settings.parameters()),
        **_placed(serving.gpu),
        **_versions(),
    }


def front_config(serving: Serving) -> dict[str, Any]:
    """The config of `ldm`, which answers once."""
    return {
        "name": "ldm",
        "backend": "python",
        "max_batch_size": 0,
        **_wired(INPUTS, OUTPUTS),
        "parameters": MapOf(serving.settings.parameters()),
        **_placed(False),
        **_versions(),
    }


def plan_name(engine: Engine) -> str:
    """The file name of an engine in a version's folder."""
    return "-".join(["model", *(c.replace(".", "") for c in engine.compute_capabilities)]) + ".plan"


def _wired(inputs: Sequence[TensorField], outputs: Sequence[TensorField]) -> dict[str, Any]:
    def message(wire: TensorField) -> dict[str, Any]:
        return {"name": wire.name, "data_type": Enum(wire.data_type), "dims": list(wire.dims)}

    taken = [message(wire) | ({"optional": True} if wire.optional else {}) for wire in inputs]
    return {"input": taken, "output": [message(wire) for wire in outputs]}


def _most(spec: ComponentSpec, engines: Sequence[Engine]) -> int:
    most = min(tensor.bounds("max")[0] for tensor in spec.inputs)
    name = spec.inputs[0].name
    return min([most, *(max(profile[name][2][0] for profile in engine.profiles) for engine in engines)])


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    """Without the batch; a tensor that is one number a row is [1] to the client and a vector to the model."""
    message = {"name": tensor.name, "data_type": Enum(f"TYPE_{DATA_TYPES[tensor.dtype]}")}
    dims = [_size(dim) for dim in tensor.shape[1:]]
    return message | ({"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}})


def _size(dim: Dim) -> int:
    return -1 if isinstance(dim, Axis) and dim.min < dim.max else dim.opt * dim.scale if isinstance(dim, Axis) else dim


def _placed(gpu: bool) -> dict[str, Any]:
    kind: Mapping[str, Any] = {"kind": Enum("KIND_GPU"), "gpus": [0]} if gpu else {"kind": Enum("KIND_CPU")}
    return {"instance_group": [{"count": 1, **kind}]}


def _versions() -> dict[str, Any]:
    return {"version_policy": {"latest": {"num_versions": 1}}}


def _optimization(serving: Serving) -> dict[str, Any]:
    if serving.target == "tensorrt":
        return {"cuda": {"graphs": True, "output_copy_stream": True}}
    if serving.target == "onnxruntime":
        return {"graph": {"level": 1}}
    return {"input_pinned_memory": {"enable": serving.gpu}, "output_pinned_memory": {"enable": serving.gpu}}


def _warmup(spec: ComponentSpec) -> dict[str, Any]:
    """One call at the usual shapes, before the model is ready."""
    inputs = {
        tensor.name: {
            "data_type": Enum(f"TYPE_{DATA_TYPES[tensor.dtype]}"),
            "dims": list(tensor.bounds("opt")[1:]) or [1],
            "zero_data": True,
        }
        for tensor in spec.inputs
    }
    return {"name": "usual shapes", "batch_size": spec.inputs[0].bounds("opt")[0], "inputs": MapOf(inputs)}
