"""int8 on a real bundle: what the engines really run, the form of the graphs, and the same bytes again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import find_layers
from ldm_calibration.qdq import insert_qdq
from ldm_calibration.record import read_record
from ldm_export.bundle.add_int8 import calibrate
from ldm_export.engine.builder import build_engine
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_export.graph.onnx_graph import save_graph
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.backends.openvino_results import keep_results
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import dummy_inputs
from tests.support.tiny_int8 import QUANTIZED, part

INTEGER = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QGemm", "ConvInteger")


def exact(values: np.ndarray, expected: np.ndarray) -> float:
    """Signal-to-noise ratio in dB."""
    return float(10 * np.log10(np.square(expected).sum() / np.square(values - expected).sum()))


@pytest.mark.parametrize("name", QUANTIZED)
def test_onnxruntime_runs_every_chosen_layer_in_integer_kernels(calibrated: Bundle, name: str, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(calibrated.graph(name, "int8")), options)
    feed = dummy_inputs(calibrated.manifest.components[name].spec)
    result = session.run(None, feed)[0]
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = Counter(e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "kernel_time" in e["name"])
    chosen = part(calibrated, name).chosen
    assert sum(kernels[kind] for kind in INTEGER) == len(chosen) > 3, kernels
    expected = onnxruntime.InferenceSession(str(calibrated.graph(name, "fp32"))).run(None, feed)[0]
    assert exact(result, expected) > 10


@pytest.mark.parametrize("name", QUANTIZED)
def test_openvino_executes_every_chosen_layer_in_int8(calibrated: Bundle, name: str) -> None:
    spec = calibrated.manifest.components[name].spec
    core = openvino.Core()
    model = core.read_model(calibrated.graph(name, "int8"))
    feed = dummy_inputs(spec)
    model.reshape({tensor: list(array.shape) for tensor, array in feed.items()})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        facts = operation.get_rt_info()
        if facts["layerType"].get() in ("Convolution", "FullyConnected", "MatMul"):
            kinds[facts["runtimePrecision"].get()] += 1
    assert kinds["i8"] + kinds["u8"] == len(part(calibrated, name).chosen), kinds
    session = onnxruntime.InferenceSession(str(calibrated.graph(name, "fp32")))
    assert exact(next(iter(compiled(feed).values())), session.run(None, feed)[0]) > 10


def test_the_openvino_backend_keeps_results_exact_and_convolutions_in_int8(calibrated: Bundle) -> None:
    spec, path = calibrated.manifest.components["unet"].spec, calibrated.graph("unet", "int8")
    feed = dummy_inputs(spec)
    rounded, exact_results = (openvino.Core().read_model(path) for _ in range(2))
    layers = part(calibrated, "unet")
    kinds = {layer["name"]: layer["op"] for layer in layers.layers}
    assert keep_results(exact_results) == sum(kinds[name] == "Conv" for name in layers.chosen) > 3
    assert keep_results(exact_results) == 0
    expected = onnxruntime.InferenceSession(str(calibrated.graph("unet", "fp32"))).run(None, feed)[0]
    decibels = []
    for model in (rounded, exact_results):
        model.reshape({tensor: list(array.shape) for tensor, array in feed.items()})
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        executed = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
        matrix = [
            facts for facts in executed if facts["layerType"].get() in ("Convolution", "FullyConnected", "MatMul")
        ]
        assert sum(facts["runtimePrecision"].get() in ("i8", "u8") for facts in matrix) == len(layers.chosen)
        decibels.append(exact(next(iter(compiled(feed).values())), expected))
    assert decibels[1] > decibels[0] + 0.5
    used = next(iter(OpenVinoBackend(path, spec).run(feed).values()))
    assert exact(used, expected) == pytest.approx(decibels[1], abs=0.2)


@pytest.mark.parametrize("name", ["unet", "text_encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def test_tensorrt_rtx_builds_it_and_its_program_computes_in_int8(calibrated: Bundle, name: str, tmp_path: Path) -> None:
    calibration = part(calibrated, name)
    islands = tuple(layer["name"] for layer in calibration.layers if not layer["int8"])
    job = EngineJob(
        calibrated.graph(name, "int8"),
        calibrated.manifest.components[name].spec,
        "int8",
        EngineRequest("tensorrt-rtx", ("8.9",)),
        tmp_path / "engine",
        islands,
    )
    built = build_engine(job)
    assert built.proof["matrix_work"]["int8"] > 3, built.proof


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_form_of_the_graph(calibrated: Bundle, name: str) -> None:
    path = calibrated.graph(name, "int8")
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    chosen = part(calibrated, name).chosen
    layers = {layer.name: layer for layer in find_layers(graph)}
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not node.inputs[2].const_value.numpy().any()
        if node.op_type == "QuantizeLinear":
            assert len(node.outputs[0].uses()) == 1  # a pair of its own for each reader
        if node.name in chosen:
            data, weights = node.inputs[0].producer(), node.inputs[1].producer()
            assert (data.op_type, weights.op_type) == ("DequantizeLinear", "DequantizeLinear")
            assert weights.inputs[0].const_value.dtype == ir.DataType.INT8
            assert weights.inputs[1].shape[0] == weights.inputs[0].shape[layers[node.name].out_axis]
            if len(node.inputs) > 2:
                assert node.inputs[2].dtype == ir.DataType.FLOAT
    assert set(chosen) <= set(layers)


def test_the_same_record_gives_the_same_graphs_byte_for_byte(
    calibrated: Bundle, bundle_copy: Path, tmp_path: Path
) -> None:
    record = calibrated.file(CALIBRATION_RECORD)
    assert read_record(record).to_json() == record.read_text()
    again = calibrate(bundle_copy, record).bundle
    for name in ("text_encoder/int8.onnx", "unet/int8.onnx", "decoder/int8.onnx", CALIBRATION_RECORD):
        assert again.file(name).read_bytes() == calibrated.file(name).read_bytes()
    other = json.loads(record.read_text())
    other["components"]["unet"]["graph"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(BuildError, match=r"^unet: calibration\.json was made for another fp32 graph"):
        calibrate(bundle_copy, tmp_path / "other.json")


def test_weights_beside_the_graph_in_a_file_of_several_links(calibrated: Bundle, tmp_path: Path) -> None:
    """As a large model's lie in the work folder of a bundle that is calibrated anew."""
    ir.save(ir.load(calibrated.graph("unet", "fp32")), tmp_path / "fp32.onnx", external_data="fp32.onnx.data")
    (tmp_path / "second").hardlink_to(tmp_path / "fp32.onnx.data")
    calibration, model = part(calibrated, "unet"), load_graph(tmp_path / "fp32.onnx")
    insert_qdq(model, calibration.tensors, calibration.chosen)
    save_graph(model, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").read_bytes() == calibrated.graph("unet", "int8").read_bytes()


def test_the_shallow_graph_computes_with_the_weights_and_scales_of_the_whole_one(calibrated: Bundle) -> None:
    whole, shallow = (load_graph(calibrated.graph(name, "int8")).graph for name in ("unet", "shallow_unet"))
    assert sum(node.op_type == "DequantizeLinear" for node in shallow) > 10
    for name, value in shallow.initializers.items():
        assert value.const_value is not None and whole.initializers[name].const_value is not None
        assert np.array_equal(value.const_value.numpy(), whole.initializers[name].const_value.numpy())
    specs = calibrated.manifest.components
    feed = dummy_inputs(specs["unet"].spec)
    sessions = [
        onnxruntime.InferenceSession(str(calibrated.graph(name, "int8")), providers=["CPUExecutionProvider"])
        for name in ("unet", "shallow_unet")
    ]
    expected, feed["deep_features"] = sessions[0].run(["noise_pred", "deep_features"], feed)
    names = [tensor.name for tensor in specs["shallow_unet"].spec.inputs]
    (result,) = sessions[1].run(None, {name: feed[name] for name in names})
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
