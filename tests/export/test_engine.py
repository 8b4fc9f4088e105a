"""Real TensorRT for RTX engines, built without a GPU: what they hold, what the manifest says, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx

from ldm_export.build import build
from ldm_export.checkpoint import open_checkpoint
from ldm_export.engine_build import EngineRequest, build_engine
from ldm_export.engine_package import known_capabilities
from ldm_export.engine_proof import prove
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.manifest import COMPONENTS

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
REQUEST = EngineRequest("tensorrt-rtx", CAPABILITIES)


@pytest.fixture(scope="module")
def engine_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    return build(open_checkpoint(tiny_checkpoint), folder, "fp16", REQUEST).bundle


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_manifest_says_what_was_built(engine_bundle: Bundle, name: str) -> None:
    (engine,) = engine_bundle.manifest.components[name].engines
    assert engine_bundle.file(engine.file).stat().st_size > 10_000
    assert (engine.package, engine.version) == ("tensorrt-rtx", tensorrt_rtx.__version__)
    assert engine.compute_capabilities == CAPABILITIES and engine.precision == "fp16"
    assert engine.graph == engine_bundle.manifest.files[f"{name}/fp16.onnx"].sha256
    assert [set(profile) for profile in engine.profiles] == [
        {tensor.name for tensor in engine_bundle.manifest.components[name].spec.inputs}
    ] * 2


@pytest.mark.parametrize("name", COMPONENTS)
def test_all_matrix_work_of_the_engine_is_half(engine_bundle: Bundle, name: str) -> None:
    (engine,) = engine_bundle.manifest.components[name].engines
    assert engine.proof["read_from"] == "program"
    assert set(engine.proof["matrix_work"]) == {"half"}
    graph = json.loads(engine_bundle.file(f"report/{name}.fp16.json").read_text())
    assert not graph["matrix_islands"] and engine.proof["matrix_work"]["half"] > 5


def test_every_convolution_of_the_graph_stands_in_the_program(engine_bundle: Bundle) -> None:
    import onnx

    graph = onnx.load(str(engine_bundle.graph("unet", "fp16"))).graph
    (engine,) = engine_bundle.manifest.components["unet"].engines
    content = engine_bundle.file(engine.file).read_bytes()
    names = [node.name for node in graph.node if node.op_type == "Conv"]
    assert names and all(name.encode() in content for name in names)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fp32_is_proven_fp32_and_never_taken_for_fp16(engine_bundle: Bundle, capability: str, tmp_path: Path) -> None:
    spec = engine_bundle.manifest.components["text_encoder"].spec
    graph, file = engine_bundle.graph("text_encoder", "fp32"), tmp_path / "fp32.engine"
    made = build_engine(graph, spec, "fp32", EngineRequest("tensorrt-rtx", (capability,)), file)
    assert set(made.proof["matrix_work"]) == {"float"}
    with pytest.raises(BuildError, match=r"matrix operations are in float, expected fp16, first .*MatMul"):
        prove(file, "fp16", ())


def test_declared_islands_are_no_failure(engine_bundle: Bundle, tmp_path: Path) -> None:
    import onnx

    graph = engine_bundle.graph("text_encoder", "fp32")
    spec, file = engine_bundle.manifest.components["text_encoder"].spec, tmp_path / "fp32.engine"
    build_engine(graph, spec, "fp32", EngineRequest("tensorrt-rtx", ("8.9",)), file)
    islands = {node.name for node in onnx.load(str(graph)).graph.node if node.op_type == "MatMul"}
    assert prove(file, "fp16", islands).beyond == ()
    with pytest.raises(BuildError, match="expected fp16"):
        prove(file, "fp16", set(list(islands)[1:]))


def test_a_file_without_a_program_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"no engine at all" * 1000)
    with pytest.raises(BuildError, match="no compiled program can be read"):
        prove(tmp_path / "x.engine", "fp16", ())


def test_building_again_keeps_the_engines_and_progress_is_told(
    tiny_checkpoint: Path, engine_bundle: Bundle, tmp_path: Path
) -> None:
    again = build(open_checkpoint(tiny_checkpoint), engine_bundle.folder, "fp16", REQUEST)
    assert set(again.origins.values()) == {"kept"}
    told: list[tuple[int, int]] = []
    spec = engine_bundle.manifest.components["text_encoder"].spec
    request = EngineRequest("tensorrt-rtx", ("8.9",), (("batch", (1, 1, 2)),), refittable=True)
    graph = engine_bundle.graph("text_encoder", "fp16")
    build_engine(graph, spec, "fp16", request, tmp_path / "e", progress=lambda *done: told.append(done))
    assert told and told[-1][0] == told[-1][1] and all(done <= total for done, total in told)


@pytest.mark.parametrize(
    ("request_", "precision", "said"),
    [
        (EngineRequest("tensorrt-rtx"), "fp16", r"compute capability: got none, expected some of 7\.5, 8\.0, "),
        (EngineRequest("tensorrt-rtx", ("9.0",)), "fp16", r"compute capability: got '9\.0', expected some of "),
        (
            EngineRequest("tensorrt-rtx", ("7.5",)),
            "fp32",
            r"7\.5 has no fp32 matrix product here; use --precision fp16",
        ),
        (EngineRequest("tensorflow", ("8.9",)), "fp16", r"target: got 'tensorflow', expected one of tensorrt-rtx, "),
        (EngineRequest("tensorrt"), "fp16", r'tensorrt is not installed; `pip install "ldm-export\[tensorrt\]"`'),
    ],
)
def test_requests_refused_before_anything_is_built(
    tiny_checkpoint: Path, tmp_path: Path, request_: EngineRequest, precision: str, said: str
) -> None:
    with pytest.raises(BuildError, match=said):
        build(open_checkpoint(tiny_checkpoint), tmp_path / "bundle", precision, request_)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_cannot_be_parsed_is_told_in_one_line(engine_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x00" * 100)
    spec = engine_bundle.manifest.components["decoder"].spec
    with pytest.raises(BuildError, match=r"^decoder: tensorrt_rtx cannot parse .*broken\.onnx: ") as caught:
        build_engine(tmp_path / "broken.onnx", spec, "fp16", REQUEST, tmp_path / "x.engine")
    assert "\n" not in str(caught.value) and not (tmp_path / "x.engine").exists()


def test_capabilities_are_the_packages_own() -> None:
    known = known_capabilities(tensorrt_rtx)
    assert {*CAPABILITIES, "7.5"} <= set(known) and "9.0" not in known
    assert known["8.9"] == tensorrt_rtx.ComputeCapability.SM89


def test_on_the_command_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldm_export.cli", "build", str(tiny_checkpoint), "-o", str(tmp_path / "bundle")]
    options = ["--precision", "fp16", "--target", "tensorrt-rtx", "--compute-capability", "8.6,8.9", "--batch", "1:1:4"]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, check=True)
    assert "unet.fp16.tensorrt-rtx-8.6-8.9" in json.loads(done.stdout)["made"]
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.components["unet"].engines[0].profiles[1]["timestep"] == ((1,), (2,), (8,))
    alone = subprocess.run([*command, "--batch", "1:1:4"], capture_output=True, text=True)
    assert alone.returncode == 1 and "give --target too" in alone.stderr
