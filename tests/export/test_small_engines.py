"""Engines of small graphs, built without a GPU: their precision, GPUs, and which graphs have matrix work to prove."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tensorrt_rtx

from ldm_export.engine.builder import build_engine
from ldm_export.engine.builder_package import check_request, engine_capabilities
from ldm_export.engine.proof import has_matrix_work, prove
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, BuildError
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
