"""The TensorRT backend: engines are matched to package, version, GPU and graph before one is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.engine import Wish, pipeline_components
from ldm_runtime.backends.engine_match import (
    PACKAGES,
    check_graph,
    engines_of,
    matching_engine,
    open_package,
    rebuild_command,
)
from ldm_runtime.backends.registry import BACKENDS
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import profile, sizes_of
from tests.support.small_bundle import SPECS, write_small_bundle

RTX = EngineFacts("unet/fp32.engine", "tensorrt-rtx", "1.7", ("8.6", "8.9"), "fp32", "0" * 64, ({},))


def with_engines(bundle: Bundle, names: Sequence[str], **changes: Any) -> Bundle:
    """The bundle with an entry for an engine of each of these components. The files of the engines do not exist."""
    components = dict(bundle.manifest.components)
    for name in names:
        graph = bundle.manifest.files[components[name].graphs["fp32"]].sha256
        facts = replace(RTX, file=f"{name}/fp32.engine", graph=graph, profiles=(profile(SPECS[name]),))
        components[name] = replace(components[name], engines=(replace(facts, **changes),))
    return replace(bundle, manifest=replace(bundle.manifest, components=components))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    plain = write_small_bundle(tmp_path / "bundle")
    return with_engines(plain, pipeline_components(plain.manifest.model))


def test_the_engine_for_this_version_and_gpu() -> None:
    older, other = replace(RTX, version="0.1"), replace(RTX, compute_capabilities=("12.0",))
    assert matching_engine("unet", [older, other, RTX], "1.7", "8.6") is RTX
    assert matching_engine("unet", [older, other, RTX], "1.7", "12.0") is other


def test_another_version_is_refused_with_both() -> None:
    with pytest.raises(BackendError, match=r"built by tensorrt-rtx 1\.7, here is 9\.9; .*--target tensorrt-rtx"):
        matching_engine("unet", [RTX], "9.9", "8.9")


def test_another_gpu_is_refused_with_both() -> None:
    message = r"are for compute capability 8\.6, 8\.9, 12\.0, this GPU has 9\.0; .*--compute-capability 9\.0"
    with pytest.raises(BackendError, match=message):
        matching_engine("unet", [RTX, replace(RTX, compute_capabilities=("12.0",))], "1.7", "9.0")


def test_a_plan_runs_on_the_kind_of_gpu_that_built_it() -> None:
    plan = replace(RTX, package="tensorrt", compute_capabilities=("9.0",))
    assert matching_engine("unet", [plan], "1.7", "9.0") is plan
    message = r"for compute capability 9\.0, this GPU has 8\.9; rebuild on this machine with .*--target tensorrt`$"
    with pytest.raises(BackendError, match=message):
        matching_engine("unet", [plan], "1.7", "8.9")


@pytest.mark.parametrize("package", PACKAGES)
def test_an_engine_that_records_no_gpu_matches_none(package: str) -> None:
    unknown = replace(RTX, package=package, compute_capabilities=())
    with pytest.raises(BackendError, match=r"for compute capability none \(not recorded\), this GPU has 8\.9; rebuild"):
        matching_engine("unet", [unknown], "1.7", "8.9")


def test_the_command_that_builds_an_engine_again() -> None:
    assert rebuild_command(RTX).endswith("--precision fp32 --target tensorrt-rtx --compute-capability 8.6,8.9`")
    plan = replace(RTX, package="tensorrt")
    assert rebuild_command(plan) == "rebuild on this machine with `ldm-export build --precision fp32 --target tensorrt`"


def test_an_engine_of_another_graph_is_refused(bundle: Bundle) -> None:
    message = r"built from a graph of sha256 1{64}, the bundle's is [0-9a-f]{64}; rebuild"
    with pytest.raises(BackendError, match=message):
        check_graph(bundle, "unet", "fp32", [replace(RTX, graph="1" * 64)])
    check_graph(bundle, "unet", "fp32", engines_of(bundle, "unet", "fp32"))


def test_every_component_of_the_pipeline_needs_an_engine(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"unet has no fp16 engine, only fp32; build it with `ldm-export build"):
        engines_of(bundle, "unet", "fp16")
    partial = with_engines(write_small_bundle(tmp_path / "partial"), ["unet"])
    with pytest.raises(BackendError, match=r"time_embedding has no fp32 engine, only none; build it with"):
        LatentDiffusionPipeline.from_bundle(partial, backend="tensorrt")


def test_an_unknown_package_is_never_imported(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"package 'os' is none of tensorrt-rtx, tensorrt"):
        open_package([replace(RTX, package="os")])
    names = tuple(name for name in SPECS if name != "step")
    foreign = with_engines(write_small_bundle(tmp_path / "foreign"), names, package="os")
    with pytest.raises(BackendError, match=r"package 'os' is none of"):
        list(BACKENDS["tensorrt"].choices(foreign, Wish()))


@pytest.mark.parametrize("name", SPECS)
def test_shapes_of_results_follow_from_the_inputs(name: str) -> None:
    spec = SPECS[name]
    shapes = {tensor.name: tensor.bounds("max") for tensor in spec.inputs}
    for tensor in spec.outputs:
        assert tensor.shape_at(sizes_of(spec, shapes)) == tensor.bounds("max")


def has_gpu() -> bool:
    try:
        Cuda()
    except BackendError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="the message of a machine without a GPU")
def test_without_a_gpu_the_engine_is_not_opened(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BackendError, match=r"^no CUDA GPU can be used \(.*\); .*--backend onnxruntime"):
        LatentDiffusionPipeline.from_bundle(bundle, backend="tensorrt")


def test_wrong_engines_are_refused_when_the_pipeline_is_opened(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    names = tuple(name for name in SPECS if name != "step")
    wrong = with_engines(write_small_bundle(tmp_path / "wrong"), names, graph="2" * 64)
    with pytest.raises(BackendError, match=r"time_embedding/fp32\.engine: built from a graph of sha256 2{16}…, the bundle"):
        LatentDiffusionPipeline.from_bundle(wrong, backend="tensorrt")
