"""Functions for the int8 benchmarks: run a graph in OpenVINO's format, and count the operations that run in int8."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.openvino import core
from ldm_runtime.specs import ComponentSpec

FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


class OpenVinoFormat:
    """Runs a graph in OpenVINO's own format, which NNCF writes. Operations that are not int8 run in fp32."""

    def __init__(self, graph: Path, spec: ComponentSpec):
        self.inputs, self.outputs = spec.inputs, spec.outputs
        options = {**FP32, "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)), "PERFORMANCE_HINT": "LATENCY"}
        self._compiled = core().compile_model(str(graph), "CPU", options)

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        results = self._compiled(dict(feed))
        return {tensor.name: np.array(results[tensor.name]) for tensor in self.outputs}

    def close(self) -> None:
        del self._compiled


def int8_share(graph: Path, spec: ComponentSpec) -> float:
    """Return the share of the operations of all convolutions and matrix products that OpenVINO executes in int8.

    Operations are counted in the original graph, for one prompt with guidance; the compiled model states the types.
    """
    model = core().read_model(str(graph))
    model.reshape({tensor.name: [2, *tensor.bounds("opt")[1:]] for tensor in spec.inputs})
    counted = {}
    for operation in model.get_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            counted[operation.get_friendly_name()] = 2 * prod(operation.output(0).shape) * summed(operation)
    compiled = core().compile_model(model, "CPU", FP32)
    in_int8 = 0
    for executed in compiled.get_runtime_model().get_ops():
        facts = executed.get_rt_info()
        if facts["runtimePrecision"].astype(str) in ("i8", "u8"):
            names = [
                name.partition("/Dequantization")[0] for name in facts["originalLayersNames"].astype(str).split(",")
            ]
            in_int8 += sum(counted.pop(name, 0) for name in names)
    return in_int8 / (in_int8 + sum(counted.values()))


def summed(operation: Any) -> int:
    """Return the number of products that are summed for one result."""
    if operation.get_type_name() == "MatMul":
        shape = list(operation.input_value(0).shape)
        return shape[-2] if operation.get_attributes()["transpose_a"] else shape[-1]
    weights = list(operation.input_value(1).shape)
    return prod(weights[1:]) if operation.get_type_name() == "Convolution" else prod(weights[2:])
