"""The config.pbtxt of each model of a Triton repository, derived from the bundle's model description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm_export.serving.pbtxt import Enum, MapOf
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.model import ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec
from ldm_runtime.triton.parameters import ModelParameters
from ldm_runtime.triton.tensors import TensorField, input_fields, output_fields

__all__ = ["DATA_TYPES", "TARGETS", "Serving", "component_config", "plan_name", "stream_config", "unary_config"]

TARGETS = ("python", "onnxruntime", "tensorrt")
"""Backends of the models of single components: Triton's Python backend with this runtime, or Triton's own backends."""
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
DATA_TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "uint8": "UINT8"}
CUDA_OPTIONS = {"prefer_nhwc": "1", "cudnn_conv_algo_search": "HEURISTIC"}
"""Options of ONNX Runtime's CUDA provider in Triton. CUDA graphs are off, because a captured graph reads the buffers of
the call that captured it, and Triton passes other buffers and batch sizes in each call."""
MAX_QUEUE_SIZE = 256
"""Maximum number of waiting requests for the model of one component."""
MAX_QUEUE_DELAY = 0
"""Microseconds that a request waits for others to join its call. A denoising loop would wait this long at every
step."""


@dataclass(frozen=True)
class Serving:
    """Options for serving a bundle.

    Attributes:
        target: Backend of the models of single components, one of ``TARGETS``.
        gpu: True if they run on a GPU.
        parameters: Parameters of the models of the Python backend.
    """

    target: str
    gpu: bool
    parameters: ModelParameters


def component_config(spec: ComponentSpec, serving: Serving, engines: Sequence[EngineFacts] = ()) -> dict[str, Any]:
    """Config of the model of one component. Triton batches requests along the first axis of every tensor.

    Args:
        spec: Spec of the component.
        serving: How the bundle is served.
        engines: For target "tensorrt", one engine per compute capability.
    """
    fields: dict[str, Any] = {"name": spec.name}
    if serving.target == "python":
        parameters = replace(serving.parameters, component=spec.name)
        fields |= {"backend": "python", "parameters": MapOf(parameters.to_config())}
    else:
        fields |= {"platform": PLATFORMS[serving.target]}
    if serving.target == "tensorrt":
        fields["default_model_filename"] = plan_name(engines[0])
        fields["cc_model_filenames"] = MapOf(
            {capability: plan_name(engine) for engine in engines for capability in engine.compute_capabilities}
        )
    return {
        **fields,
        "max_batch_size": _max_batch_size(spec, engines),
        "input": [_tensor(tensor) for tensor in spec.inputs],
        "output": [_tensor(tensor) for tensor in spec.outputs],
        "dynamic_batching": {
            "max_queue_delay_microseconds": MAX_QUEUE_DELAY,
            "default_queue_policy": {"allow_timeout_override": True, "max_queue_size": MAX_QUEUE_SIZE},
        },
        **_instance_group(serving.gpu),
        "optimization": _optimization(serving),
        "model_warmup": [_warmup(spec)],
        **_version_policy(),
    }


def stream_config(model: ModelDescription, serving: Serving) -> dict[str, Any]:
    """Config of `ldm_stream`, which batches requests itself and responds to each step.

    Raises:
        SpecError: The model has a kind of conditioning that has no tensors.
    """
    return {
        "name": "ldm_stream",
        "backend": "python",
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        **_fields(input_fields(model, stream=True), output_fields(model, stream=True)),
        "parameters": MapOf(serving.parameters.to_config()),
        **_instance_group(serving.gpu),
        **_version_policy(),
    }


def unary_config(model: ModelDescription, serving: Serving) -> dict[str, Any]:
    """Config of `ldm`, which sends one response per request; errors as ``stream_config``."""
    return {
        "name": "ldm",
        "backend": "python",
        "max_batch_size": 0,
        **_fields(input_fields(model), output_fields(model)),
        "parameters": MapOf(serving.parameters.to_config()),
        **_instance_group(False),
        **_version_policy(),
    }


def plan_name(engine: EngineFacts) -> str:
    """File name of an engine in the folder of a version."""
    return "-".join(["model", *(c.replace(".", "") for c in engine.compute_capabilities)]) + ".plan"


def _fields(inputs: Sequence[TensorField], outputs: Sequence[TensorField]) -> dict[str, Any]:
    def message(field: TensorField) -> dict[str, Any]:
        return {"name": field.name, "data_type": Enum(field.data_type), "dims": list(field.dims)}

    accepted = [message(field) | ({"optional": True} if field.optional else {}) for field in inputs]
    return {"input": accepted, "output": [message(field) for field in outputs]}


def _max_batch_size(spec: ComponentSpec, engines: Sequence[EngineFacts]) -> int:
    most = min(tensor.bounds("max")[0] for tensor in spec.inputs)
    name = spec.inputs[0].name
    return min([most, *(max(profile[name][2][0] for profile in engine.profiles) for engine in engines)])


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    """Describe a tensor without its batch axis. One number per row is [1] for the client and reshaped to a vector."""
    message = {"name": tensor.name, "data_type": Enum(f"TYPE_{DATA_TYPES[tensor.dtype]}")}
    dims = [_size(dim) for dim in tensor.shape[1:]]
    return message | ({"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}})


def _size(dim: Dim) -> int:
    return -1 if isinstance(dim, Axis) and dim.min < dim.max else dim.opt * dim.scale if isinstance(dim, Axis) else dim


def _instance_group(gpu: bool) -> dict[str, Any]:
    kind: Mapping[str, Any] = {"kind": Enum("KIND_GPU"), "gpus": [0]} if gpu else {"kind": Enum("KIND_CPU")}
    return {"instance_group": [{"count": 1, **kind}]}


def _version_policy() -> dict[str, Any]:
    return {"version_policy": {"latest": {"num_versions": 1}}}


def _optimization(serving: Serving) -> dict[str, Any]:
    if serving.target == "tensorrt":
        return {"cuda": {"graphs": True, "output_copy_stream": True}}
    if serving.target == "onnxruntime":
        cuda = {"name": "cuda", "parameters": MapOf(CUDA_OPTIONS)}
        accelerators = {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}
        return {"graph": {"level": 1}, **(accelerators if serving.gpu else {})}
    return {"input_pinned_memory": {"enable": serving.gpu}, "output_pinned_memory": {"enable": serving.gpu}}


def _warmup(spec: ComponentSpec) -> dict[str, Any]:
    """One call at the optimal shapes before the model is ready."""
    inputs = {
        tensor.name: {
            "data_type": Enum(f"TYPE_{DATA_TYPES[tensor.dtype]}"),
            "dims": list(tensor.bounds("opt")[1:]) or [1],
            "zero_data": True,
        }
        for tensor in spec.inputs
    }
    return {"name": "usual shapes", "batch_size": spec.inputs[0].bounds("opt")[0], "inputs": MapOf(inputs)}
