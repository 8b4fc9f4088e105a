"""The TensorRT backend: engines are matched to package, version, GPU and graph before one is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.driver import Gpu
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.backends.engine_advice import RTX_CAPABILITIES, other_gpu, rebuild_command
from ldm_runtime.backends.engine_match import PACKAGES, check_graph, engines_of, find_engine, runs_version
from ldm_runtime.backends.host import is_installed
from ldm_runtime.backends.tensorrt_log import error_log
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BackendError
from ldm_runtime.installation import install_command
from ldm_runtime.specs import profile, sizes_of
from tests.support.small_bundle import SPECS, write_small_bundle

RTX = EngineFacts("unet/fp32.engine", "tensorrt-rtx", "1.7", ("8.6", "8.9"), "fp32", "0" * 64, ({},))
PLAN = replace(RTX, package="tensorrt", version="11.4.0.106", compute_capabilities=("8.9",))
CUDA = (13, 0)


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


def with_engines_of(bundle: Bundle, *engines: EngineFacts) -> Bundle:
    """The bundle with these engines of the UNet, as if they had been built from its graph."""
    unet = bundle.manifest.components["unet"]
    graph = bundle.manifest.files[unet.graphs["fp32"]].sha256
    built = tuple(replace(engine, graph=graph) for engine in engines)
    components = {**bundle.manifest.components, "unet": replace(unet, engines=built)}
    return replace(bundle, manifest=replace(bundle.manifest, components=components))


def test_the_engine_for_this_gpu_and_version(bundle: Bundle) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    here = replace(RTX, version=rtx.__version__)
    older, other = replace(here, version="0.1"), replace(here, compute_capabilities=("12.0",))
    several = with_engines_of(bundle, older, other, here)
    for capability, expected in (("8.6", here), ("12.0", other)):
        facts, package = find_engine(several, "unet", "fp32", Gpu(capability, CUDA))
        assert (facts.version, facts.compute_capabilities) == (expected.version, expected.compute_capabilities)
        assert package is rtx


def test_a_driver_that_is_too_old_for_the_package_is_refused(bundle: Bundle) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    here = with_engines_of(bundle, replace(RTX, version=rtx.__version__))
    message = (
        r"^the NVIDIA driver supports CUDA 11\.8, tensorrt-rtx needs 1\d; update the driver, or install tensorrt-rtx "
    )
    with pytest.raises(BackendError, match=message):
        find_engine(here, "unet", "fp32", Gpu("8.9", (11, 8)))


def test_another_version_is_refused_with_both(bundle: Bundle) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    message = rf"built by tensorrt-rtx 1\.7, here is {rtx.__version__}; install .*--compute-capability 8\.6,8\.9`$"
    with pytest.raises(BackendError, match=message):
        find_engine(with_engines_of(bundle, RTX), "unet", "fp32", Gpu("8.9", CUDA))


@pytest.mark.parametrize(
    ("engine", "capability", "advice"),
    [
        (
            RTX,
            "12.0",
            r"rebuild with `ldm-export build --precision fp32 --target tensorrt-rtx --compute-capability 12\.0`$",
        ),
        (
            RTX,
            "9.0",
            rf"does not support 9\.0: use --backend onnxruntime with `{re.escape(install_command('gpu'))}`, "
            "or build plans of TensorRT on this machine with `ldm-export build --precision fp32 --target tensorrt`$",
        ),
        (RTX, "7.5", r"TensorRT for RTX has no fp32 matrix product for 7\.5: use --backend onnxruntime with "),
        (replace(RTX, precision="fp16"), "7.5", r"rebuild with .*--precision fp16 .*--compute-capability 7\.5`$"),
        (PLAN, "9.0", r"rebuild on this machine with `ldm-export build --precision fp32 --target tensorrt`$"),
    ],
)
def test_another_gpu_is_refused_with_advice_that_can_be_followed(
    engine: EngineFacts, capability: str, advice: str
) -> None:
    known = re.escape(", ".join(engine.compute_capabilities))
    message = (
        rf"^unet: its engines are for compute capability {known}, this GPU has {re.escape(capability)}; .*{advice}"
    )
    assert re.search(message, str(other_gpu("unet", [engine], Gpu(capability, CUDA))))


def test_an_engine_that_records_no_gpu_matches_none(bundle: Bundle) -> None:
    for package in PACKAGES:
        unknown = with_engines_of(bundle, replace(RTX, package=package, compute_capabilities=()))
        with pytest.raises(BackendError, match=r"capability none \(not recorded\), this GPU has 8\.9; rebuild"):
            find_engine(unknown, "unet", "fp32", Gpu("8.9", CUDA))


def test_the_gpus_of_tensorrt_for_rtx_are_those_of_the_package() -> None:
    names = dir(pytest.importorskip("tensorrt_rtx").ComputeCapability)
    assert {f"SM{capability.replace('.', '')}" for capability in RTX_CAPABILITIES} == {
        name for name in names if name.startswith("SM")
    }


@pytest.mark.parametrize(
    ("built", "compatible", "here", "runs"),
    [
        ("11.4.0.106", False, "11.4.0.106", True),
        ("11.4.0.106", False, "11.4.0.107", False),
        ("11.4.0.106", True, "11.10.0.1", True),
        ("11.4.0.106", True, "11.3.0.99", False),
        ("10.16.1.11", True, "11.4.0.106", False),
    ],
)
def test_which_version_runs_a_plan(built: str, compatible: bool, here: str, runs: bool) -> None:
    assert runs_version(replace(PLAN, version=built, version_compatible=compatible), here) is runs


def test_the_command_that_builds_an_engine_again() -> None:
    assert rebuild_command(RTX).endswith("--precision fp32 --target tensorrt-rtx --compute-capability 8.6,8.9`")
    assert rebuild_command(PLAN) == "rebuild on this machine with `ldm-export build --precision fp32 --target tensorrt`"
    assert rebuild_command(replace(PLAN, version_compatible=True)).endswith("--target tensorrt --version-compatible`")


def test_an_engine_of_another_graph_is_refused(bundle: Bundle) -> None:
    message = r"built from a graph of sha256 1{16}…, the bundle's is [0-9a-f]{16}…; rebuild"
    with pytest.raises(BackendError, match=message):
        check_graph(bundle, "unet", "fp32", [replace(RTX, graph="1" * 64)])
    check_graph(bundle, "unet", "fp32", engines_of(bundle, "unet", "fp32"))


def test_every_component_of_the_pipeline_needs_an_engine(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"unet has no fp16 engine, only fp32; build it with `ldm-export build"):
        engines_of(bundle, "unet", "fp16")
    partial = with_engines(write_small_bundle(tmp_path / "partial"), ["unet"])
    with pytest.raises(BackendError, match=r"time_embedding has no fp32 engine, only none; build it with"):
        LatentDiffusionPipeline.from_bundle(partial, backend="tensorrt")


def test_an_unknown_package_is_never_imported(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"package 'os' is none of tensorrt-rtx, tensorrt; rebuild it"):
        find_engine(with_engines_of(bundle, replace(RTX, package="os")), "unet", "fp32", Gpu("8.9", CUDA))


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


def test_an_engine_of_another_graph_is_refused_before_its_gpu_is_compared(bundle: Bundle, tmp_path: Path) -> None:
    wrong = with_engines(write_small_bundle(tmp_path / "wrong"), ["unet"], graph="2" * 64)
    with pytest.raises(BackendError, match=r"unet/fp32\.engine: built from a graph of sha256 2{16}…, the"):
        find_engine(wrong, "unet", "fp32", Gpu("9.0", CUDA))


def test_the_lean_runtime_runs_version_compatible_plans_where_tensorrt_is_missing(bundle: Bundle) -> None:
    lean = pytest.importorskip("tensorrt_lean")
    if is_installed("tensorrt"):
        pytest.skip("TensorRT is installed and preferred")
    major = lean.__version__.partition(".")[0]
    plan = replace(PLAN, version=f"{major}.0.0.1", version_compatible=True)
    assert find_engine(with_engines_of(bundle, plan), "unet", "fp32", Gpu("8.9", CUDA))[1] is lean
    newer = replace(plan, version=f"{major}.99.0")
    with pytest.raises(BackendError, match=rf"built by tensorrt {major}\.99\.0, here is .*--version-compatible`$"):
        find_engine(with_engines_of(bundle, newer), "unet", "fp32", Gpu("8.9", CUDA))
    with pytest.raises(BackendError, match=f"^tensorrt is not installed; `{re.escape(install_command('tensorrt'))}`$"):
        find_engine(with_engines_of(bundle, PLAN), "unet", "fp32", Gpu("8.9", CUDA))


def test_the_lean_runtime_has_everything_that_runs_an_engine() -> None:
    lean = pytest.importorskip("tensorrt_lean")
    used = {
        lean.Runtime: ("deserialize_cuda_engine", "engine_host_code_allowed"),
        lean.ICudaEngine: ("create_execution_context",),
        lean.IExecutionContext: (
            "set_optimization_profile_async",
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
        ),
    }
    assert not [name for kind, names in used.items() for name in names if not hasattr(kind, name)]
    assert not hasattr(lean, "Builder") and error_log(lean).first() == "it gives no reason"
    assert {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"} <= set(dir(lean.BuilderFlag))
