"""Graphs whose outputs are not what the manifest says: an error of one line, not a crash or a wrong image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import BackendError, ManifestError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, check_result
from tests.support.small_bundle import SPECS, write_small_bundle

DECODERS = {
    "shape": ("float", None, [("Identity", {})]),
    "rank": ("float", None, [("Flatten", {})]),
    "declared rank": ("float", [1, 4], [("Flatten", {})]),
    "scalar": ("float", None, [("ReduceSum", {"keepdims": 0})]),
    "string": ("string", None, [("Cast", {"to": T.STRING})]),
    "half": ("float16", None, [("Cast", {"to": T.FLOAT16})]),
    "integers": ("int64", None, [("Cast", {"to": T.INT64})]),
    "double": ("double", None, [("Cast", {"to": T.DOUBLE})]),
    "truth": ("bool", None, [("Cast", {"to": T.BOOL})]),
}
KINDS = {
    "float": T.FLOAT,
    "string": T.STRING,
    "float16": T.FLOAT16,
    "int64": T.INT64,
    "double": T.DOUBLE,
    "bool": T.BOOL,
}


def exchange(bundle: Bundle, component: str, nodes: list, output: str, shape, initializers=()) -> Bundle:
    """Put another graph in a component's place, in the manifest too."""
    spec = SPECS[component]
    inputs = [
        helper.make_tensor_value_info(
            tensor.name,
            T.FLOAT if tensor.dtype == "float32" else T.INT64,
            [dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape],
        )
        for tensor in spec.inputs
    ]
    outputs = [helper.make_tensor_value_info(spec.outputs[0].name, KINDS[output], shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = f"{component}/other.onnx"
    (bundle.folder / file).write_bytes(model.SerializeToString())
    part = replace(bundle.manifest.components[component], graphs={"fp32": file}, variants={})
    manifest = replace(
        bundle.manifest,
        components={**bundle.manifest.components, component: part},
        files={**bundle.manifest.files, **file_facts(bundle.folder, [file])},
    )
    (bundle.folder / MANIFEST).write_text(manifest.to_json())
    return Bundle.open(bundle.folder)


def refused(bundle: Bundle, backend: str, match: str) -> None:
    with (
        LatentDiffusionPipeline.from_bundle(bundle, backend=backend, precision="fp32", threads=1) as pipeline,
        pytest.raises((BackendError, ManifestError), match=match) as caught,
    ):
        pipeline(count=1, seed=1, num_inference_steps=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_with_another_output_is_refused(tmp_path: Path, kind: str, backend: str) -> None:
    output, shape, ((operator, attributes),) = DECODERS[kind]
    nodes = [helper.make_node(operator, ["latents"], ["image"], **attributes)]
    bundle = exchange(write_small_bundle(tmp_path / "bundle"), "decoder", nodes, output, shape)
    refused(
        bundle, backend, "^decoder: |other.onnx: outputs: image is .*, the manifest says image: float32|cannot load"
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("component", "shape"), [("unet", (3, 4, 4, 4)), ("time_embedding", (7, 8))])
def test_rows_that_do_not_fit_the_call_are_refused(tmp_path: Path, component: str, shape, backend: str) -> None:
    constant = numpy_helper.from_array(np.zeros(shape, np.float32), "c")
    nodes = [helper.make_node("Identity", ["c"], [SPECS[component].outputs[0].name])]
    bundle = exchange(write_small_bundle(tmp_path / "bundle"), component, nodes, "float", None, [constant])
    refused(bundle, backend, rf"^{component}: output .* the engine returned \[{shape[0]}, .*; the graph is not")


BATCH, SIDE = Axis("batch", 1, 1, 8), Axis("side", 1, 1, 8)
SPEC = ComponentSpec(
    "toy", (TensorSpec("x", "float32", (BATCH, 3, 2 * SIDE)),), (TensorSpec("y", "float32", (BATCH, 8 * SIDE)),)
)
FEED = {"x": np.zeros((2, 3, 4), np.float32)}


def test_a_result_that_fits_passes() -> None:
    check_result(SPEC, FEED, {"y": np.zeros((2, 16), np.float32), "other": None})


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ({}, "NoneType"),
        ({"y": [1.0]}, "list"),
        ({"y": np.zeros((2, 16))}, r"float64 \[2, 16\]"),
        ({"y": np.zeros((2, 16, 1), np.float32)}, r"float32 \[2, 16, 1\]"),
        ({"y": np.zeros((), np.float32)}, r"float32 \[\]"),
        ({"y": np.zeros((1, 16), np.float32)}, r"\[1, 16\]"),
        ({"y": np.zeros((2, 8), np.float32)}, r"\[2, 8\]"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(result, got: str) -> None:
    message = (
        rf"^toy: output y: float32 \[batch, 8\*side\]: the engine returned {got} for {{'batch': 2, 'side': 2}}; the"
    )
    with pytest.raises(BackendError, match=message):
        check_result(SPEC, FEED, result)
