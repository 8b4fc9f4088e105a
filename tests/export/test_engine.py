"""Real TensorRT for RTX engines, built without a GPU: their content, the manifest's entries, and refused requests."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tensorrt_rtx

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.demo import demo_checkpoint
from ldm_export.engine.attention import unfused_warning
from ldm_export.engine.builder import build_engine
from ldm_export.engine.builder_package import known_capabilities
from ldm_export.engine.proof import prove
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_export.families import open_checkpoint
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes.half_precision import half_precision
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.engine_advice import RTX_CAPABILITIES
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import graph_file
from ldm_runtime.device_loop import GUIDED_STEP, STEP
from ldm_runtime.errors import BackendError, BuildError
from ldm_runtime.installation import install_command
from ldm_runtime.model import SHALLOW_UNET, UNET
from tests.support.bundles import CAPABILITIES, ENGINES
from tests.support.configs_only import write_configs

COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "shallow_unet", "decoder")


def has_gpu() -> bool:
    try:
        Cuda()
    except BackendError:
        return False
    return True


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_manifest_says_what_was_built(shapes_engines: Bundle, name: str) -> None:
    (engine,) = shapes_engines.manifest.components[name].engines
    assert shapes_engines.file(engine.file).stat().st_size > 10_000
    assert (engine.package, engine.version) == ("tensorrt-rtx", tensorrt_rtx.__version__)
    assert engine.compute_capabilities == CAPABILITIES and engine.precision == "fp16"
    assert engine.graph == shapes_engines.manifest.files[graph_file(name, "fp16")].sha256
    assert [set(profile) for profile in engine.profiles] == [
        {tensor.name for tensor in shapes_engines.manifest.components[name].spec.inputs}
    ] * 2


@pytest.mark.parametrize("name", COMPONENTS)
def test_all_matrix_work_of_the_engine_is_half(shapes_engines: Bundle, name: str) -> None:
    (engine,) = shapes_engines.manifest.components[name].engines
    assert engine.proof["read_from"] == "program"
    assert set(engine.proof["matrix_work"]) == {"half"}
    source = UNET if name == SHALLOW_UNET else name
    graph = json.loads(shapes_engines.file(f"report/{source}.fp16.json").read_text())
    assert not graph["matrix_islands"] and engine.proof["matrix_work"]["half"] > 1


@pytest.mark.parametrize(("name", "fused", "attentions"), [("text_encoder", 3, 3), ("unet", 14, 14), ("decoder", 0, 1)])
def test_every_attention_is_looked_for_in_the_program(
    shapes_engines: Bundle, name: str, fused: int, attentions: int
) -> None:
    """The decoder's single head is not fused by this version of the builder."""
    (engine,) = shapes_engines.manifest.components[name].engines
    proof = engine.proof["attention"]
    assert (proof["fused"], proof["graph"]) == (fused, attentions)
    content = shapes_engines.file(engine.file).read_bytes()
    assert content.count(b"multihead_attention_params_v2") == fused * len(engine.profiles)
    warning = unfused_warning(name, engine)
    if fused == attentions:
        assert warning is None and "unfused" not in proof
    else:
        assert warning is not None and f"does not fuse 1 of 1 attentions, first {proof['unfused'][0]}" in warning
        assert unfused_warning(name, replace(engine, precision="fp32")) is None


def test_every_convolution_of_the_graph_stands_in_the_program(shapes_engines: Bundle) -> None:
    import onnx

    graph = onnx.load(str(shapes_engines.graph("unet", "fp16")), load_external_data=False).graph
    (engine,) = shapes_engines.manifest.components["unet"].engines
    content = shapes_engines.file(engine.file).read_bytes()
    names = [node.name for node in graph.node if node.op_type == "Conv"]
    assert names and all(name.encode() in content for name in names)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fp32_is_proven_fp32_and_never_taken_for_fp16(shapes_engines: Bundle, capability: str, tmp_path: Path) -> None:
    spec = shapes_engines.manifest.components["text_encoder"].spec
    graph, file = shapes_engines.graph("text_encoder", "fp32"), tmp_path / "fp32.engine"
    built = build_engine(EngineJob(graph, spec, "fp32", EngineRequest("tensorrt-rtx", (capability,)), file))
    assert set(built.proof["matrix_work"]) == {"float"}
    assert (built.proof["attention"]["fused"], len(built.proof["attention"]["unfused"])) == (0, 3)
    with pytest.raises(BuildError, match=r"matrix operations are in float, expected fp16, first .*MatMul"):
        prove(file, "fp16", ())


def test_inspect_shows_engines(shapes_engines: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shapes_engines.folder), "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["components"]["unet"]["engines"]
    assert engine["compute_capabilities"] == list(CAPABILITIES) and set(engine["proof"]["matrix_work"]) == {"half"}
    assert main(["inspect", str(shapes_engines.folder)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "matrix work" in shown and "fused attention: 14 of 14" in shown


def test_bf16_is_proven_bf16(shapes_engines: Bundle, tmp_path: Path) -> None:
    ranges = json.loads(shapes_engines.file("report/ranges.json").read_text())["text_encoder"]
    source, spec = shapes_engines.graph("text_encoder", "fp32"), shapes_engines.manifest.components["text_encoder"].spec
    half = half_precision("bf16", ranges)(load_graph(source))
    graph, *_ = save_graph(half.model, tmp_path / "bf16.onnx")
    request = EngineRequest("tensorrt-rtx", ("8.9",))
    built = build_engine(EngineJob(graph, spec, "bf16", request, tmp_path / "bf16.engine"))
    assert set(built.proof["matrix_work"]) == {"bf16"}
    assert built.proof["attention"] == {"graph": 3, "fused": 3}
    with pytest.raises(BuildError, match="matrix operations are in bf16, expected fp16"):
        prove(tmp_path / "bf16.engine", "fp16", ())


def test_declared_islands_are_no_failure(shapes_engines: Bundle, tmp_path: Path) -> None:
    import onnx

    graph = shapes_engines.graph("text_encoder", "fp32")
    spec, file = shapes_engines.manifest.components["text_encoder"].spec, tmp_path / "fp32.engine"
    build_engine(EngineJob(graph, spec, "fp32", EngineRequest("tensorrt-rtx", ("8.9",)), file))
    islands = {
        node.name for node in onnx.load(str(graph), load_external_data=False).graph.node if node.op_type == "MatMul"
    }
    assert prove(file, "fp16", islands).beyond == ()
    with pytest.raises(BuildError, match="expected fp16"):
        prove(file, "fp16", sorted(islands)[1:])


def test_a_file_without_a_program_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"no engine at all" * 1000)
    with pytest.raises(BuildError, match="no compiled program can be read"):
        prove(tmp_path / "x.engine", "fp16", ())


def test_building_again_keeps_the_engines_and_progress_is_reported(shapes_engines: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shapes_engines.folder, tmp_path / "bundle"))
    again = build(open_checkpoint(demo_checkpoint()), copy, "fp16", ENGINES)
    assert set(again.origins.values()) == {"kept"}
    reported: list[tuple[int, int]] = []
    spec = shapes_engines.manifest.components["text_encoder"].spec
    request = EngineRequest("tensorrt-rtx", ("8.9",), (("batch", (1, 1, 2)),))
    graph = shapes_engines.graph("text_encoder", "fp16")
    build_engine(EngineJob(graph, spec, "fp16", request, tmp_path / "e"), lambda *done: reported.append(done))
    assert reported and reported[-1][0] == reported[-1][1] and all(done <= total for done, total in reported)


@pytest.mark.parametrize(
    ("request_", "precision", "message"),
    [
        (EngineRequest("tensorrt-rtx"), "fp16", r"compute capability: got none, expected some of 7\.5, 8\.0, "),
        (
            EngineRequest("tensorrt-rtx", ("9.0",)),
            "fp16",
            r"^compute capability: got '9\.0', expected some of .*; for a GPU of 9\.0 build with --target "
            rf"onnxruntime-cuda, which `{re.escape(install_command('gpu'))}` runs, or on such a GPU with --target "
            r"tensorrt$",
        ),
        (EngineRequest("tensorrt-rtx", ("ada",)), "fp16", r"^compute capability: got 'ada', expected .*\)$"),
        (
            EngineRequest("tensorrt-rtx", ("7.5",)),
            "fp32",
            r"TensorRT for RTX has no fp32 matrix product for 7\.5; use --precision fp16",
        ),
        (EngineRequest("tensorflow", ("8.9",)), "fp16", r"target: got 'tensorflow', expected one of tensorrt-rtx, "),
        (EngineRequest("tensorrt"), "fp16", f"tensorrt is not installed; `{re.escape(install_command('tensorrt'))}`"),
        (
            EngineRequest("tensorrt-rtx", ("8.9",), timings="timings"),
            "fp16",
            r"tensorrt_rtx times no kernels while it builds; leave --timing-cache out",
        ),
        (
            EngineRequest("tensorrt-rtx", ("8.9",), version_compatible=True),
            "fp16",
            r"^version-compatible: engines of tensorrt_rtx run with the version that built them only; leave ",
        ),
        pytest.param(
            EngineRequest("tensorrt-rtx", ("8.9",), refittable=True),
            "fp16",
            r"^refittable: tensorrt_rtx needs a GPU to build engines whose weights can be exchanged \(no CUDA GPU",
            marks=pytest.mark.skipif(has_gpu(), reason="what a machine without a GPU says"),
        ),
    ],
)
def test_requests_refused_before_anything_is_built(
    tiny_checkpoint: Path, tmp_path: Path, request_: EngineRequest, precision: str, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        build(open_checkpoint(tiny_checkpoint), tmp_path / "bundle", precision, request_)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 100, b"no graph"])
def test_a_graph_that_cannot_be_parsed_is_reported_in_one_line(
    shapes_engines: Bundle, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    spec = shapes_engines.manifest.components["decoder"].spec
    with pytest.raises(BuildError, match=r"^decoder: tensorrt_rtx cannot parse .*broken\.onnx: ") as caught:
        build_engine(EngineJob(tmp_path / "broken.onnx", spec, "fp16", ENGINES, tmp_path / "x.engine"))
    assert "\n" not in str(caught.value) and not (tmp_path / "x.engine").exists()


def test_capabilities_are_the_packages_own() -> None:
    known = known_capabilities(tensorrt_rtx)
    assert {*RTX_CAPABILITIES, "7.5"} <= set(known) and "9.0" not in known
    assert known["8.9"] == tensorrt_rtx.ComputeCapability.SM89


def test_fp32_engines_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The graphs exist already; the engines are built."""
    configs, bundle = write_configs(tmp_path / "small"), tmp_path / "bundle"
    build(open_checkpoint(configs, random_weights=True), bundle)
    command = ["build", str(configs), "--random-weights", "-o", str(bundle), "--batch", "1:1:4"]
    capfd.readouterr()
    assert main([*command, "--target", "tensorrt-rtx", "--compute-capability", "8.9, 8.9", "--json"]) == 0
    request = EngineRequest("tensorrt-rtx", ("8.9",))
    stages = [f"{name}.fp32.{request.name}" for name in (*COMPONENTS, STEP, GUIDED_STEP)]
    assert sorted(json.loads(capfd.readouterr().out)["made"]) == sorted(stages)
    components = Bundle.open(bundle).manifest.components
    assert components["unet"].engines[0].profiles[1]["sample"][2][0] == 8
    assert components["time_embedding"].engines[0].profiles[1]["timestep"] == ((1,), (2,), (64,))
    for name in COMPONENTS:
        assert set(components[name].engines[0].proof["matrix_work"]) == {"float"}
    assert main(command) == 1 and "add --target" in capfd.readouterr().err
