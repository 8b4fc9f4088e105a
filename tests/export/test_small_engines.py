"""Engines of small graphs, built without a GPU: their precision, GPUs, and which graphs have matrix work to prove."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import helper, numpy_helper

from ldm_export.engine.builder import build_engine
from ldm_export.engine.builder_package import check_request, engine_capabilities
from ldm_export.engine.proof import has_matrix_work, prove
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, BuildError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.support.small_bundle import SPECS, write_small_bundle

ALL_GPUS = EngineRequest("tensorrt-rtx", ("7.5", "8.9"))
ADA = EngineRequest("tensorrt-rtx", ("8.9",))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_small_bundle(tmp_path_factory.mktemp("small") / "bundle")


def job(bundle: Bundle, component: str, request: EngineRequest, target: Path) -> EngineJob:
    return EngineJob(bundle.graph(component, "fp32"), SPECS[component], "fp32", request, target)


@pytest.mark.parametrize("component", ["time_embedding", "unet", "decoder"])
def test_every_component_with_matrix_work_is_proven(bundle: Bundle, component: str, tmp_path: Path) -> None:
    engine = build_engine(job(bundle, component, ADA, tmp_path / "x.engine"))
    assert engine.proof["read_from"] == "program" and set(engine.proof["matrix_work"]) == {"float"}
    with pytest.raises(BuildError, match="matrix operations are in float, expected fp16"):
        prove(tmp_path / "x.engine", "fp16", ())
    islands = {node.name for node in onnx.load(bundle.graph(component, "fp32"), load_external_data=False).graph.node}
    assert prove(tmp_path / "x.engine", "fp16", islands).beyond == ()


def test_many_products_of_one_input_are_one_operation(tmp_path: Path) -> None:
    """As the keys and values of all 70 transformer blocks of Stable Diffusion XL."""
    names = [
        f"unet.down_blocks.2.attentions.1.transformer_blocks.{i}.attn2.to_{kind}" for i in range(70) for kind in "kv"
    ]
    nodes = [helper.make_node("Cast", ["context"], ["half"], to=onnx.TensorProto.FLOAT16)]
    for name in names:
        nodes.append(helper.make_node("MatMul", ["half", f"{name}.weight"], [f"{name}.half"], name=f"{name}/MatMul"))
        nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    weights = np.random.default_rng(0).standard_normal((len(names), 16, 16)).astype(np.float16)
    constants = [numpy_helper.from_array(w, f"{name}.weight") for name, w in zip(names, weights, strict=True)]
    values = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 77, 16])
        for name in ("context", *names)
    }
    graph = helper.make_graph(nodes, "kv", [values["context"]], [values[name] for name in names], constants)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "kv.onnx")
    tensors = {name: TensorSpec(name, "float32", (Axis("batch", 1, 2, 8), 77, 16)) for name in values}
    spec = ComponentSpec("kv", (tensors["context"],), tuple(tensors[name] for name in names))
    engine = build_engine(EngineJob(tmp_path / "kv.onnx", spec, "fp16", ADA, tmp_path / "x.engine"))
    assert engine.proof == {"read_from": "program", "matrix_work": {"half": 2}}  # one in each of two profiles


def test_a_graph_without_matrix_work_runs_on_every_gpu(bundle: Bundle, tmp_path: Path) -> None:
    assert not has_matrix_work(bundle.graph("step", "fp32"))
    engine = build_engine(job(bundle, "step", ALL_GPUS, tmp_path / "x.engine"))
    assert engine.proof == {"read_from": "graph", "matrix_work": {}}
    assert engine.compute_capabilities == ("7.5", "8.9")


def test_fp32_matrix_work_is_refused_for_a_gpu_without_it(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no fp32 matrix product for 7\.5; use --precision fp16"):
        build_engine(job(bundle, "unet", ALL_GPUS, tmp_path / "x.engine"))
    check_request(tensorrt_rtx, ALL_GPUS, None)
    check_request(tensorrt_rtx, ALL_GPUS, "fp16")


def test_a_request_without_gpus_is_for_the_gpu_at_hand() -> None:
    request = EngineRequest("tensorrt")
    try:
        capability = Cuda().capability()
    except BackendError:
        with pytest.raises(BuildError, match=r"^tensorrt: builds for the GPU at hand, but no CUDA GPU can be used"):
            engine_capabilities(request)
    else:
        assert engine_capabilities(request) == (capability,)
    assert engine_capabilities(ALL_GPUS) == ("7.5", "8.9")
