"""Graphs for ONNX Runtime on CUDA compute what the portable graphs compute, with few casts and transposes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ldm_export.bundle.variant_stages import FP32_INSIDE
from ldm_export.graph.nodes import range_names
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes import ENGINE_PASSES, apply
from ldm_export.graph.passes.half_precision import half_precision
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CUDA_VARIANT, graph_file
from tests.export.graph.whole import KINDS, Whole, run
from tests.support.contrib_operators import evaluate

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def rewritten(path: Path, folder: Path) -> tuple[ir.Model, Path]:
    """The graph after the passes for CUDA, and its file."""
    model = apply(load_graph(path), ENGINE_PASSES[CUDA_VARIANT]).model
    save_graph(model, folder / "cuda.onnx")
    return model, folder / "cuda.onnx"


def relative_difference(first: Array, second: Array) -> float:
    return float(np.abs(first.astype(np.float64) - second).max() / np.abs(second).max())


@pytest.mark.parametrize("kind", KINDS)
def test_unets_of_even_groups(kind: str, wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes[kind]
    model, path = rewritten(whole.path, tmp_path)
    operators = Counter(node.op_type for node in model.graph)
    assert operators["InstanceNormalization"] == operators["Conv"] == operators["Softmax"] == 0
    zeros = [str(node.outputs[0].shape) for node in model.graph if node.op_type == "Expand"]
    assert operators["LayerNormalization"] == 0 and len(set(zeros)) == len(zeros)
    assert operators["Transpose"] == 2  # of the graph's input and output
    for size in whole.sizes[:2] + whole.sizes[4:5]:
        feed = whole.feed(*size)
        (ours,), (theirs,) = evaluate(path, feed).values(), run(whole.path, feed).values()
        assert relative_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("component", ["unet", "decoder", "text_encoder", "cross_attention_kv", "time_embedding"])
def test_components_of_odd_and_even_groups(component: str, shapes_bundle: Path, tmp_path: Path) -> None:
    """The demo model has 96 channels in 32 groups, for which GroupNorm has no kernel, and 128, for which it has."""
    source = shapes_bundle / component / "fp32.onnx"
    model, path = rewritten(source, tmp_path)
    operators = Counter(node.op_type for node in model.graph)
    if component == "unet":
        assert operators["InstanceNormalization"] == 11 and operators["SkipGroupNorm"] + operators["GroupNorm"] == 13
    assert operators["Softmax"] == 0
    feed = random_feed(source)
    ours, theirs = evaluate(path, feed), run(source, feed)
    assert max(relative_difference(ours[name], theirs[name]) for name in theirs) < 2e-5


def random_feed(path: Path) -> dict[str, Array]:
    sizes = {"batch": 2, "height": 8, "width": 6}
    feed: dict[str, Array] = {}
    for value in load_graph(path).graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape or ()]
        floats = value.dtype == ir.DataType.FLOAT
        feed[value.name or ""] = RNG.standard_normal(shape).astype(np.float32) if floats else RNG.integers(0, 20, shape)
    return feed


def constant_ranges(model: ir.Model, **magnitudes: float) -> dict[str, float]:
    """A magnitude of 1 for every tensor that is not named."""
    return {value.name or "": 1.0 for node in model.graph for value in node.outputs} | magnitudes


def half(path: Path, half_values: tuple[str, ...] = (), **magnitudes: float) -> ir.Model:
    ranges = constant_ranges(load_graph(path), **magnitudes)
    model = apply(load_graph(path), ENGINE_PASSES[CUDA_VARIANT]).model
    return half_precision("fp16", ranges, fp32_inside=FP32_INSIDE, half_values=half_values)(model).model


def test_fp16_casts_the_first_input_and_the_output_only(tiny_bundle: Path, tmp_path: Path) -> None:
    source = tiny_bundle / "unet" / "fp32.onnx"
    graph = load_graph(source).graph
    shared = tuple(
        value.name or "" for value in (*graph.inputs, *graph.outputs) if value.name not in ("sample", "noise_pred")
    )
    model = half(source, half_values=shared)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert [node.inputs[0].name for node in casts if node.inputs[0]] == ["sample", "noise_pred/half"]
    save_graph(model, tmp_path / "half.onnx")
    feed = random_feed(source)
    halved = {name: array.astype(np.float16) if name in shared else array for name, array in feed.items()}
    ours, theirs = evaluate(tmp_path / "half.onnx", halved)["noise_pred"], run(source, feed)["noise_pred"]
    assert 1e-5 < relative_difference(ours, theirs) < 5e-3


def test_tensors_beyond_fp16_stay_in_fp32(wholes: dict[str, Whole], tmp_path: Path) -> None:
    """A sum that is normalized reaches 1e6: the fused operator and its neighbours compute it in fp32."""
    whole = wholes["conditional"]
    name = "unet.down_blocks.0.resnets.0/Add_2"
    (total,) = (node.outputs[0].name or "" for node in load_graph(whole.path).graph if node.name == name)
    model = half(whole.path, **{total: 1e6})
    fused = [node for node in model.graph for value in node.outputs if total in range_names(value)]
    assert "SkipGroupNorm" in {node.op_type for node in fused}
    assert all(value.dtype == ir.DataType.FLOAT for node in fused for value in node.outputs)
    assert sum(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in model.graph) > 20


def test_a_product_beyond_fp16_stays_in_fp32_where_its_bias_is_fused(wholes: dict[str, Whole]) -> None:
    """The product before a bias and a LayerNormalization reaches 1e6; with the bias, the sum does not."""
    path = wholes["conditional"].path
    model = apply(load_graph(path), ENGINE_PASSES[CUDA_VARIANT]).model
    tokens = next(
        value
        for node in model.graph
        for value in node.outputs
        if (node.name or "").endswith("/tokens")
        and any(use.node.op_type == "SkipLayerNormalization" for use in value.uses())
    )
    product = tokens.producer().inputs[0]
    model = half(path, **dict.fromkeys(range_names(product), 1e6))
    values = {value.name: value for node in model.graph for value in node.outputs}
    users = {use.node.op_type: use.node for use in values[tokens.name].uses()}
    assert users["SkipLayerNormalization"].outputs[0].dtype == ir.DataType.FLOAT


def test_shared_tensors_are_fp16_at_both_ends(tiny_bundle: Path) -> None:
    for component in ("cross_attention_kv", "unet"):
        path = tiny_bundle / component / "fp32.onnx"
        model = half(path, half_values=("kv.0", "kv.1"))
        types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
        assert types["kv.0"] == ir.DataType.FLOAT16


def test_the_bundle_lists_the_graphs(cuda_bundle: Bundle) -> None:
    for name, component in cuda_bundle.manifest.components.items():
        graphs = component.variants.get(CUDA_VARIANT, {})
        assert graphs == ({} if "step" in name else {"fp16": graph_file(name, "fp16", CUDA_VARIANT)})
    cuda_bundle.check()
    graph = onnx.load(cuda_bundle.file(f"unet/fp16.{CUDA_VARIANT}.onnx"), load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types.pop("sample") == TensorProto.FLOAT
    assert set(types.values()) == {TensorProto.FLOAT16}


def contrib(op_type: str, inputs: dict[str, Array], outputs: int, **attributes: Any) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()]
    names = [f"out{index}" if index in (0, 3) else "" for index in range(outputs)]
    node = helper.make_node(op_type, list(inputs), names, domain="com.microsoft", **attributes)
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", values, results), opset_imports=opsets, ir_version=10)


def random(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op_type", "inputs", "outputs", "attributes"),
    [
        (
            "MultiHeadAttention",
            {"query": random(2, 5, 12), "key": random(2, 7, 12), "value": random(2, 7, 12)},
            1,
            {"num_heads": 3, "scale": 0.4},
        ),
        (
            "SkipLayerNormalization",
            {"x": random(2, 5, 8), "skip": random(2, 5, 8), "gamma": random(8), "beta": random(8), "bias": random(8)},
            4,
            {"epsilon": 1e-5},
        ),
        (
            "SkipLayerNormalization",
            {"x": random(2, 5, 8), "zeros": np.zeros((5, 8), np.float32), "gamma": random(8), "beta": random(8)}
            | {"bias": random(8)},
            4,
            {"epsilon": 1e-5},
        ),
    ],
)
def test_operators_agree_with_onnx_runtime_on_the_cpu(
    op_type: str, inputs: dict[str, Array], outputs: int, attributes: dict[str, Any]
) -> None:
    model = contrib(op_type, inputs, outputs, **attributes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))
    ours = evaluate(model, inputs)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-5)
