"""Backends compared on one feed, and precisions tensor by tensor: what parts, where first, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx
from polygraphy.backend import onnxrt

from ldm_export.cli import main
from ldm_export.quality.comparison import Run, parse_runs
from ldm_export.quality.layerwise import compare_layers, first_beyond
from ldm_export.quality.polygraphy_engines import POLYGRAPHY, PolygraphyBackend, PolygraphyTensorRtLoader
from ldm_runtime.backends.engine import Engine
from ldm_runtime.backends.engine_match import MatchedEngine
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BackendError, BuildError, SpecError
from ldm_runtime.specs import dummy_inputs

COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "shallow_unet", "decoder")


@pytest.fixture(scope="module")
def half(half_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of ``half_bundle``, because ``verify`` records its results in the bundle."""
    return Bundle.open(shutil.copytree(half_bundle.folder, tmp_path_factory.mktemp("compared") / "bundle"))


def test_backends_are_compared_on_the_same_feed(half: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    backends = "onnxruntime:fp32,onnxruntime:fp16,openvino:fp32,polygraphy:fp32,polygraphy:fp16"
    runs = backends.split(",")[1:]
    assert main(["verify", str(half.folder), "--backends", backends, "--steps", "3", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["against"] == "onnxruntime:fp32" and output["within_tolerance"]
    errors = {(one["run"], one["part"]): one["max_error"] for one in output["differences"]}
    assert set(errors) == {(run, part) for run in runs for part in (*COMPONENTS, "image")}
    assert errors["polygraphy:fp32", "unet"] < 1e-4 < errors["polygraphy:fp16", "unet"] < 0.02
    assert 0 < errors["openvino:fp32", "unet"] < errors["onnxruntime:fp16", "unet"] < 0.02
    assert Bundle.open(half.folder).manifest.measured["backends"] == output


def test_a_backend_that_gives_something_else_is_named(
    half: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its graph is another model's: the digest in the manifest is right, and all its results are wrong."""
    folder = Path(shutil.copytree(half.folder, tmp_path / "bundle"))
    model = ir.load(folder / "decoder/fp16.onnx")
    weight = next(value for value in model.graph.initializers.values() if len(value.shape or ()) == 4)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)
    ir.save(model, folder / "decoder/fp16.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    from ldm_runtime.atomic_files import sha256

    file = folder / "decoder/fp16.onnx"
    manifest["files"]["decoder/fp16.onnx"] = {"sha256": sha256(file), "size": file.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    backends = "onnxruntime:fp32,onnxruntime:fp16"
    assert main(["verify", str(folder), "--backends", backends, "--steps", "2"]) == 1
    out = capsys.readouterr().out
    assert "beyond tolerance: onnxruntime:fp16: decoder: max error" in out
    assert "beyond tolerance: onnxruntime:fp16: text_encoder" not in out
    assert main(["verify", str(folder), "--layers"]) == 1
    out = capsys.readouterr().out
    assert f"decoder: differs first at {next(iter(weight.uses())).node.outputs[0].name}" in out.replace("\n", "")
    assert "unet: all" in out and "text_encoder: all" in out


def test_layers_of_the_half_graphs_agree(half: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(half.folder), "--layers", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["precision"] == "fp16" and set(output["components"]) == set(COMPONENTS)
    for component in output["components"].values():
        assert component["tensors"] >= 8 and component["first_beyond"] is None
        assert 0 < component["worst"]["error"] < 0.02
    assert main(["verify", str(half.folder), "--layers", "--tolerance", "1e-6", "--json"]) == 1
    first = json.loads(capsys.readouterr().out)["components"]["unet"]["first_beyond"]
    assert first["error"] > 1e-6 and first["node"]


def test_the_first_tensor_is_that_of_the_graphs_order(half: Bundle) -> None:
    spec = half.manifest.components["unet"].spec
    layers = compare_layers(half.graph("unet", "fp16"), half.graph("unet", "fp32"), dummy_inputs(spec, "min"))
    order = [value.name for node in ir.load(half.graph("unet", "fp16")).graph for value in node.outputs]
    places = [order.index(layer.tensor) for layer in layers]
    assert places == sorted(places)
    first = first_beyond(layers, 1e-5)
    assert first is not None and all(layer.error <= 1e-5 for layer in layers[: layers.index(first)])
    assert layers[-1].tensor == "noise_pred" and np.isfinite(layers[-1].error)


def test_graphs_of_two_components_share_nothing(half: Bundle) -> None:
    spec = half.manifest.components["text_encoder"].spec
    with pytest.raises(BuildError, match=r"cannot run it on the CPU|shares no tensor"):
        compare_layers(half.graph("text_encoder", "fp16"), half.graph("decoder", "fp32"), dummy_inputs(spec, "min"))


def test_runs_are_backends_with_or_without_a_precision() -> None:
    assert parse_runs("onnxruntime, openvino:fp32", "fp16") == (Run("onnxruntime", "fp16"), Run("openvino", "fp32"))
    for text in ("onnxruntime", "", "onnxruntime,onnxruntime", "openvino:fp16,openvino"):
        with pytest.raises(SpecError, match="expected two or more that differ"):
            parse_runs(text, "fp16")


def test_bad_options_are_refused(half: Bundle, refused: Callable[..., None]) -> None:
    for backends, message in (
        ("onnxruntime,caffe", "backend: got 'caffe'"),
        ("onnxruntime:fp32,onnxruntime:fp8", "no fp8 graph"),
        ("onnxruntime,polygraphy:fp8", "no fp8 graph"),
        ("onnxruntime,polygraphy-tensorrt", "has no fp16 engine, only none"),
    ):
        refused("verify", half.folder, "--backends", backends, "--steps", "1", message=message)
    message = "--layers: got fp32, which is the reference"
    refused("verify", half.folder, "--layers", "--precision", "fp32", message=message)


def test_polygraphy_names_what_it_cannot_load_or_run(half: Bundle, tmp_path: Path) -> None:
    spec, file = half.manifest.components["decoder"].spec, tmp_path / "torn.onnx"
    file.write_bytes(half.graph("decoder", "fp32").read_bytes()[:100])
    with pytest.raises(BackendError, match=r"^decoder: polygraphy cannot load it: .*torn\.onnx"):
        PolygraphyBackend(spec, lambda: onnxrt.OnnxrtRunner(onnxrt.SessionFromOnnx(str(file))))
    session = onnxrt.SessionFromOnnx(str(half.graph("decoder", "fp32")))
    backend = PolygraphyBackend(half.manifest.components["unet"].spec, lambda: onnxrt.OnnxrtRunner(session))
    with pytest.raises(BackendError, match=r"^unet: polygraphy cannot run it: "):
        backend.run(dummy_inputs(half.manifest.components["unet"].spec, "min"))
    backend.close()


def test_polygraphy_says_why_tensorrt_cannot_load_an_engine(half: Bundle) -> None:
    part, file = half.manifest.components["decoder"], half.manifest.components["decoder"].graphs["fp32"]
    facts = EngineFacts(file, "tensorrt-rtx", tensorrt_rtx.__version__, ("8.9",), "fp32", "", ({},))
    loader = PolygraphyTensorRtLoader(MatchedEngine(facts, half.verified(file), part.spec, tensorrt_rtx))
    with pytest.raises(
        BackendError, match=rf"^decoder: polygraphy cannot load .*{file}: IRuntime::deserializeCudaEngine"
    ):
        loader()


def test_both_runners_of_polygraphy_are_engines() -> None:
    assert set(POLYGRAPHY) == {"polygraphy", "polygraphy-tensorrt"}
    assert all(isinstance(engine, Engine) and engine.available() is None for engine in POLYGRAPHY.values())
