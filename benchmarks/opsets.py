"""Tests which engines accept which form of a transformer block's operators, and measures their error and speed.

There are three forms. The portable form is that of a bundle's graphs: opset 20, with attention and group
normalization decomposed. The standard form has the operators Attention (opset 23) and GroupNormalization (opset 21).
The contrib form has ONNX Runtime's MultiHeadAttention. The sizes are those of the UNet of text2im-large at 256 x 256
pixels: first level, two guidance branches. Run the script with ``--json`` in an environment of each version of an
engine; it merges its results into the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, TOKENS, HEADS, WIDTH, GROUPS = 2, 1024, 8, 40, 32
CHANNELS = HEADS * WIDTH
FORMS = ("portable", "standard", "contrib")
Run = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    args = parser.parse_args()
    facts: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        files = {form: Path(tmp) / f"{form}.onnx" for form in FORMS}
        for form, file in files.items():
            onnx.save(model(form), file)
        for name, package, start in (
            ("onnxruntime", "onnxruntime", onnxruntime),
            ("openvino", "openvino", openvino),
            ("tensorrt-rtx", "tensorrt-rtx", tensorrt_rtx),
        ):
            try:
                key = f"{name} {version(package)}"
            except PackageNotFoundError:
                continue
            facts[key] = compare(files, start, args.threads, args.runs)
            for form, result in facts[key].items():
                print(f"{key}: {form}: {result}")
    if args.json:
        args.json.write_text(json.dumps(dict(sorted(facts.items())), indent=2) + "\n")


def compare(files: dict[str, Path], start: Callable[..., Run | None], threads: int, runs: int) -> dict[str, Any]:
    """Form -> accepted, and for engines that run here the error and the time relative to the portable form."""
    sample = np.random.default_rng(0).standard_normal((ROWS, CHANNELS, 32, 32)).astype(np.float32)
    results: dict[str, Any] = {}
    opened: dict[str, Run] = {}
    for form, file in files.items():
        try:
            run = start(file, threads)
        except Exception as error:
            text = " ".join(str(error).replace(f"{file.parent}/", "").split())
            results[form] = {"accepted": False, "error": f"{type(error).__name__}: {text:.160}"}
            continue
        results[form] = {"accepted": True}
        if run is not None:
            opened[form] = run
    if "portable" not in opened:
        return results
    expected = opened["portable"](sample)
    seconds: dict[str, list[float]] = {form: [] for form in opened}
    for _ in range(runs):
        for form, run in opened.items():
            begun = time.perf_counter()
            output = run(sample)
            seconds[form].append(time.perf_counter() - begun)
            results[form]["max_error"] = float(np.abs(output - expected).max() / np.abs(expected).max())
    for form, times in seconds.items():
        results[form]["time_ratio"] = round(statistics.median(times) / statistics.median(seconds["portable"]), 3)
    return results


def model(form: str) -> onnx.ModelProto:
    """A group normalization and a self-attention: sample float32 [R, C, 32, 32] -> result float32 [R, T, C]."""
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal((CHANNELS, CHANNELS)).astype(np.float32) / 18 for name in ("wq", "wk", "wv")}
    weights |= {"scale": np.ones(CHANNELS, np.float32), "bias": np.zeros(CHANNELS, np.float32)}
    constants = {
        "flat": np.array([0, CHANNELS, TOKENS]),
        "groups": np.array([0, GROUPS, -1]),
        "image": np.array([ROWS, CHANNELS, 32, 32]),
        "heads": np.array([0, TOKENS, HEADS, WIDTH]),
        "tokens": np.array([0, TOKENS, CHANNELS]),
        "group_ones": np.ones(GROUPS, np.float32),
        "group_zeros": np.zeros(GROUPS, np.float32),
        "root": np.array(WIDTH**-0.5, np.float32),
        "scale_c": weights["scale"].reshape(-1, 1, 1),
        "bias_c": weights["bias"].reshape(-1, 1, 1),
    }
    nodes = _group_norm(form)
    nodes += [
        helper.make_node("Reshape", ["normal", "flat"], ["normal_flat"]),
        helper.make_node("Transpose", ["normal_flat"], ["states"], perm=[0, 2, 1]),
        *(helper.make_node("MatMul", ["states", f"w{letter}"], [letter]) for letter in "qkv"),
        *_attention(form),
    ]
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, [ROWS, CHANNELS, 32, 32])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [ROWS, TOKENS, CHANNELS])],
        [numpy_helper.from_array(array, name) for name, array in {**weights, **constants}.items()],
    )
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    opsets = [helper.make_opsetid("", 23 if form == "standard" else 20)]
    if form == "contrib":
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=11 if form == "standard" else 10)


def _group_norm(form: str) -> list[onnx.NodeProto]:
    if form == "standard":
        inputs = ["sample", "scale", "bias"]
        return [helper.make_node("GroupNormalization", inputs, ["normal"], num_groups=GROUPS, epsilon=1e-5)]
    return [
        helper.make_node("Reshape", ["sample", "groups"], ["grouped"]),
        helper.make_node("InstanceNormalization", ["grouped", "group_ones", "group_zeros"], ["instance"], epsilon=1e-5),
        helper.make_node("Reshape", ["instance", "image"], ["restored"]),
        helper.make_node("Mul", ["restored", "scale_c"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias_c"], ["normal"]),
    ]


def _attention(form: str) -> list[onnx.NodeProto]:
    if form == "standard":
        heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        return [helper.make_node("Attention", ["q", "k", "v"], ["result"], **heads)]
    if form == "contrib":
        inputs = ["q", "k", "v"]
        return [helper.make_node("MultiHeadAttention", inputs, ["result"], domain="com.microsoft", num_heads=HEADS)]
    nodes = []
    for letter, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(helper.make_node("Reshape", [letter, "heads"], [f"{letter}_heads"]))
        nodes.append(helper.make_node("Transpose", [f"{letter}_heads"], [f"{letter}_rows"], perm=order))
    return [
        *nodes,
        helper.make_node("MatMul", ["q_rows", "k_rows"], ["products"]),
        helper.make_node("Mul", ["products", "root"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v_rows"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["mixed_tokens"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mixed_tokens", "tokens"], ["result"]),
    ]


def onnxruntime(file: Path, threads: int) -> Run:
    """Load a graph in ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda sample: session.run(None, {"sample": sample})[0]


def openvino(file: Path, threads: int) -> Run:
    """Compile a graph with OpenVINO for the CPU, with float32 arithmetic."""
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(file), "CPU", settings)
    return lambda sample: np.array(compiled([sample])[0])


def tensorrt_rtx(file: Path, threads: int) -> None:
    """Build an engine for compute capability 8.9; it can only run on a GPU."""
    import tensorrt_rtx as trt

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(file)):
        raise ValueError(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if builder.build_serialized_network(network, config) is None:
        raise ValueError("no engine was built")


if __name__ == "__main__":
    main()
