"""Half-precision graphs: close to fp32, islands where they are needed, and right where plain half is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.torch import load_file

from ldm_calibration.model import CalibrationModel
from ldm_calibration.ranges import measure_ranges
from ldm_export.bundle.build import build
from ldm_export.families import open_checkpoint
from ldm_export.graph.islands import MATRIX
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes.half_precision import HalfResult, half_precision
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import dummy_inputs
from tests.support.checkpoints import random_checkpoint, write_tensors

COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder")
NORMALIZED = ("text_encoder", "unet", "decoder")
"""Components with normalizations and softmax."""
PROMPT, OPTIONS = "a red circle", {"seed": 1, "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 7}
SCALE = 2e5
OVERFLOWING = {
    "unet": ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj"),
    "vqvae": ("decoder.mid_block.resnets.0.conv1",),
}
"""Layers whose results only a normalisation reads: scaled, they overflow in half, and the image stays the same."""


@pytest.fixture(scope="module")
def overflowing_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = random_checkpoint(tmp_path_factory.mktemp("overflowing") / "tiny")
    target = shutil.copytree(tiny_bundle, folder.parent / "bundle")  # its text encoder is the same
    for component, layers in OVERFLOWING.items():
        file = folder / component / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        for layer in layers:
            for name in (f"{layer}.weight", f"{layer}.bias"):
                state[name] = state[name] * SCALE
                assert state[name].abs().max() < 65504
        write_tensors(file, state)
    return build(open_checkpoint(folder), target, "fp16").bundle


def half_graph(source: Path, target: Path, precision: str, ranges: dict[str, float]) -> HalfResult:
    """Write ``source`` in half precision to ``target``."""
    half = half_precision(precision, ranges)(load_graph(source))
    save_graph(half.model, target)
    return half


def first_image(bundle: Bundle, precision: str) -> np.ndarray:
    with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime") as pipeline:
        return np.asarray(pipeline(PROMPT, **OPTIONS).images[0], np.float64)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(one - other).mean(), 1e-12)))


def test_the_image_is_close_to_that_of_fp32(half_bundle: Bundle) -> None:
    assert half_bundle.precision == "fp16"
    assert psnr(first_image(half_bundle, "fp32"), first_image(half_bundle, "fp16")) >= 45


@pytest.mark.parametrize("name", [*COMPONENTS, "shallow_unet"])
def test_all_matrix_work_and_all_its_weights_are_half(half_bundle: Bundle, name: str) -> None:
    graph = ir.load(half_bundle.graph(name, "fp16")).graph
    work = [node for node in graph if node.op_type in MATRIX]
    assert work
    for node in work:
        assert {value.dtype for value in (*node.inputs, *node.outputs) if value} == {ir.DataType.FLOAT16}, node.name
    for side in (graph.inputs, graph.outputs):
        assert {value.dtype for value in side} <= {ir.DataType.FLOAT, ir.DataType.INT64}


@pytest.mark.parametrize("name", NORMALIZED)
def test_statistics_and_softmax_are_fp32(half_bundle: Bundle, name: str) -> None:
    graph = ir.load(half_bundle.graph(name, "fp16")).graph
    float_nodes = [node for node in graph if node.op_type in ("InstanceNormalization", "LayerNormalization", "Softmax")]
    assert float_nodes
    for node in float_nodes:
        assert {value.dtype for value in (*node.inputs, *node.outputs) if value} == {ir.DataType.FLOAT}, node.name


@pytest.mark.parametrize("name", [*COMPONENTS, "shallow_unet"])
def test_types_are_consistent_and_no_cast_stands_twice(half_bundle: Bundle, name: str) -> None:
    path = half_bundle.graph(name, "fp16")
    onnx.checker.check_model(str(path), full_check=True)
    casts = [(node.inputs[0], node.attributes["to"].value) for node in ir.load(path).graph if node.op_type == "Cast"]
    assert len(casts) == len(set(casts))


def test_half_graphs_are_half_the_size(half_bundle: Bundle) -> None:
    files = half_bundle.manifest.files
    for name in COMPONENTS:
        half, whole = (
            sum(fact.size for file, fact in files.items() if file.startswith(f"{name}/{precision}.onnx"))
            for precision in ("fp16", "fp32")
        )
        assert half < 0.65 * whole


def test_building_again_does_nothing_and_other_precisions_keep_what_is_there(
    tiny_checkpoint: Path, bundle_copy: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    more = build(checkpoint, bundle_copy, "fp16").origins
    assert {name for name, origin in more.items() if origin == "made"} == {
        *("ranges", "shallow_unet.fp16"),
        *(f"{c}.fp16" for c in COMPONENTS),
    }
    assert set(build(checkpoint, bundle_copy, "fp16").origins.values()) == {"kept"}


def test_activations_beyond_half_still_give_the_right_image(overflowing_bundle: Bundle) -> None:
    expected, result = first_image(overflowing_bundle, "fp32"), first_image(overflowing_bundle, "fp16")
    assert result.std() > 1 and psnr(expected, result) >= 45
    for component, name in (("unet", "down_blocks.0.resnets.0.conv1"), ("decoder", "mid_block.resnets.0.conv1")):
        report = json.loads(overflowing_bundle.file(f"report/{component}.fp16.json").read_text())
        reasons = {node: reason for node, reason in report["islands"].items() if reason.startswith("range")}
        assert any(name in node for node in reasons), reasons
        assert any(name in node for node in report["matrix_islands"])


@pytest.mark.parametrize("name", ["unet", "decoder"])
def test_without_islands_by_range_they_would_overflow(overflowing_bundle: Bundle, name: str, tmp_path: Path) -> None:
    """The plain conversion, blind to ranges, gives infinities: so the image above is the islands' doing."""
    source = overflowing_bundle.graph(name, "fp32")
    ranges = json.loads(overflowing_bundle.file("report/ranges.json").read_text())[name]
    half_graph(source, tmp_path / "blind.onnx", "fp16", dict.fromkeys(ranges, 0.0))
    spec = overflowing_bundle.manifest.components[name].spec
    feed = dummy_inputs(spec)
    blind = OnnxRuntimeBackend(tmp_path / "blind.onnx", spec, "cpu").run(feed)
    right = OnnxRuntimeBackend(source, spec, "cpu").run(feed)
    aware = OnnxRuntimeBackend(overflowing_bundle.graph(name, "fp16"), spec, "cpu").run(feed)
    output = next(iter(right))
    scale = np.abs(right[output]).max()
    assert np.abs(aware[output] - right[output]).max() < 0.02 * scale
    assert not np.abs(blind[output] - right[output]).max() < 0.02 * scale


def test_bf16_keeps_the_structural_islands_only(overflowing_bundle: Bundle, tmp_path: Path) -> None:
    ranges = json.loads(overflowing_bundle.file("report/ranges.json").read_text())["unet"]
    assert max(ranges.values()) > 65504
    half = half_graph(overflowing_bundle.graph("unet", "fp32"), tmp_path / "unet.onnx", "bf16", ranges)
    assert set(half.islands.values()) == {"statistics", "softmax"}
    onnx.checker.check_model(str(tmp_path / "unet.onnx"), full_check=True)
    ranges = json.loads(overflowing_bundle.file("report/ranges.json").read_text())["time_embedding"]
    half = half_graph(overflowing_bundle.graph("time_embedding", "fp32"), tmp_path / "time.onnx", "bf16", ranges)
    assert set(half.islands.values()) == {"timestep embedding"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_bf16_graphs_give_what_fp32_gives(overflowing_bundle: Bundle, name: str, tmp_path: Path) -> None:
    """In OpenVINO, which has kernels for bf16 where ONNX Runtime's CPU has none."""
    source, spec = overflowing_bundle.graph(name, "fp32"), overflowing_bundle.manifest.components[name].spec
    ranges = json.loads(overflowing_bundle.file("report/ranges.json").read_text())[name]
    half_graph(source, tmp_path / "bf16.onnx", "bf16", ranges)
    feed = dummy_inputs(spec)
    results = OpenVinoBackend(tmp_path / "bf16.onnx", spec, "fp32").run(feed)
    for output, expected in OnnxRuntimeBackend(source, spec, "cpu").run(feed).items():
        result = results[output]
        assert result.dtype == expected.dtype
        assert 1e-4 < np.abs(result - expected).max() / np.abs(expected).max() < 0.1


def test_weights_beside_a_graph_that_an_earlier_build_has_linked(half_bundle: Bundle, tmp_path: Path) -> None:
    """As those of a large model are: in a file of their own, which the bundle and the build share."""
    name, folder = "decoder", tmp_path / "earlier"
    folder.mkdir()
    ir.save(ir.load(half_bundle.graph(name, "fp32")), folder / "fp32.onnx", external_data="fp32.onnx.data")
    for file in ("fp32.onnx", "fp32.onnx.data"):
        (tmp_path / file).hardlink_to(folder / file)
    ranges = json.loads(half_bundle.file("report/ranges.json").read_text())[name]
    half_graph(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", "fp16", ranges)
    assert (tmp_path / "fp16.onnx").read_bytes() == half_bundle.graph(name, "fp16").read_bytes()


def test_a_tensor_nobody_measured_is_refused(half_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^decoder: pass half_precision: \d+ tensors were not measured"):
        half_graph(half_bundle.graph("decoder", "fp32"), tmp_path / "x.onnx", "fp16", {})
    assert not list(tmp_path.iterdir())


def test_ranges_are_those_of_the_trajectory(half_bundle: Bundle) -> None:
    """Against the same tensors taken out of the graph whole, over the same trajectory."""
    graphs = {name: half_bundle.graph(name, "fp32") for name in COMPONENTS}
    model = CalibrationModel(half_bundle.manifest.model, graphs, half_bundle.file)
    ranges = measure_ranges(model, [{"prompts": PROMPT}], 3)
    with LatentDiffusionPipeline.from_bundle(half_bundle, precision="fp32", backend="onnxruntime") as pipeline:
        generation = pipeline(PROMPT, seed=0, eta=0.3, guidance_scale=6.0, num_inference_steps=3)
        image = pipeline.backends["decoder"].run({"latents": generation.latents})["image"]
    assert ranges["decoder"]["image"] == pytest.approx(float(np.abs(image).max()))
    assert len(ranges["unet"]) > 100 and min(ranges["unet"].values()) >= 0
    assert not [path for graph in graphs.values() for path in graph.parent.iterdir() if "probe" in path.name]


def test_weights_that_give_infinity_are_refused(tiny: Path, bundle_copy: Path) -> None:
    file = tiny / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"] = state["conv_in.weight"] * 1e38
    write_tensors(file, state)
    with pytest.raises(BuildError, match=r"^unet: tensor '.*' is not finite in fp32"):
        build(open_checkpoint(tiny), bundle_copy, "fp16")
    bundle = Bundle.open(bundle_copy)
    bundle.check()
    assert bundle.precision == "fp32"
