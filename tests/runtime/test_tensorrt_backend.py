"""The TensorRT backend: what it refuses before an engine is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.engine_match import check_graph, choose, open_package
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError
from ldm_runtime.manifest import COMPONENTS
from ldm_runtime.specs import sizes_of


@pytest.fixture(scope="module")
def bundle(shapes_engines: Bundle) -> Bundle:
    return shapes_engines


def engines(bundle: Bundle) -> tuple:
    return bundle.manifest.components["unet"].engines


def test_the_engine_for_this_version_and_gpu(bundle: Bundle) -> None:
    (engine,) = engines(bundle)
    assert choose("unet", [replace(engine, version="0.1"), engine], engine.version, "8.6") is engine


def test_another_version_is_refused_with_both(bundle: Bundle) -> None:
    (engine,) = engines(bundle)
    with pytest.raises(
        BackendError, match=rf"built by tensorrt-rtx {engine.version}, here is 9\.9; .*--target tensorrt-rtx"
    ):
        choose("unet", [engine], "9.9", "8.9")


def test_another_gpu_is_refused_with_both(bundle: Bundle) -> None:
    (engine,) = engines(bundle)
    said = r"are for compute capability 8\.0, 8\.6, 8\.9, 12\.0, this GPU has 9\.0; .*--compute-capability 9\.0"
    with pytest.raises(BackendError, match=said):
        choose("unet", [engine], engine.version, "9.0")


def test_an_engine_of_another_graph_is_refused(bundle: Bundle) -> None:
    (engine,) = engines(bundle)
    with pytest.raises(
        BackendError, match=r"built from a graph of sha256 1{64}, the bundle's is [0-9a-f]{64}; rebuild"
    ):
        check_graph(bundle, "unet", "fp16", [replace(engine, graph="1" * 64)])


def test_no_engine_of_that_precision(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"unet has no fp32 engine, only fp16; build it with `ldm-export build"):
        check_graph(bundle, "unet", "fp32", [])


def test_an_unknown_package_is_never_imported(bundle: Bundle) -> None:
    (engine,) = engines(bundle)
    with pytest.raises(BackendError, match=r"package 'os' is none of tensorrt-rtx, tensorrt"):
        open_package([replace(engine, package="os")])


@pytest.mark.parametrize("name", COMPONENTS)
def test_shapes_of_results_follow_from_the_inputs(bundle: Bundle, name: str) -> None:
    spec = bundle.manifest.components[name].spec
    shapes = {tensor.name: tensor.bounds("max") for tensor in spec.inputs}
    for tensor in spec.outputs:
        assert tensor.shape_at(sizes_of(spec, shapes)) == tensor.bounds("max")


def has_gpu() -> bool:
    try:
        Cuda()
    except BackendError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="what a machine without a GPU says")
def test_without_a_gpu_the_engine_is_not_opened(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"^no CUDA GPU can be used \(.*\); .*--backend onnxruntime"):
        LatentDiffusionPipeline.from_bundle(bundle, backend="tensorrt")


@pytest.mark.parametrize("backend", ["tensorflow", "", "TensorRT"])
def test_unknown_backends(bundle: Bundle, backend: str) -> None:
    with pytest.raises(BackendError, match="expected one of auto, onnxruntime, openvino, tensorrt"):
        LatentDiffusionPipeline.from_bundle(bundle, backend=backend)
