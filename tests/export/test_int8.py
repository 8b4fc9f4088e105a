"""int8 on a real bundle: what the engines really run, the same bytes again, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest

from ldm_calibration.budget import Budget, ranked, select
from ldm_calibration.layers import find_layers
from ldm_calibration.qdq import Scaling, insert_qdq
from ldm_calibration.quality import psnr, right, ssim
from ldm_calibration.record import ComponentRecord, read_record
from ldm_calibration.sensitivity import unet_sensitivity
from ldm_calibration.sessions import load_graph
from ldm_calibration.settings import Settings
from ldm_calibration.trajectories import Model, run_trajectories
from ldm_calibration.trials import Comparison
from ldm_calibration.weights import read_when_used
from ldm_export.bundle.calibrate import calibrate
from ldm_export.bundle.int8_report import write_report
from ldm_export.bundle.int8_stages import RECORD
from ldm_export.checkpoint.folder import open_checkpoint
from ldm_export.engine.build import build_engine
from ldm_export.engine.request import EngineRequest
from ldm_export.graph.onnx_graph import save_graph
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import BuildError, LdmError, ManifestError
from ldm_runtime.manifest import COMPONENTS
from ldm_runtime.specs import dummy_inputs

PROMPTS = ("a red circle", "a blue square")
SETTINGS = Settings(PROMPTS, PROMPTS, steps=3, samples=2, trial_steps=3, sensitivity="results", min_psnr=15.0)
INTEGER = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QGemm", "ConvInteger")


@pytest.fixture(scope="module")
def int8_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny_bundle``, calibrated; not to be changed."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("int8") / "bundle")
    bundle, _ = write_report(calibrate(folder, SETTINGS).bundle)
    return bundle


def part(bundle: Bundle, name: str) -> ComponentRecord:
    return read_record(bundle.file(RECORD)).components[name]


def model_of(bundle: Bundle) -> Model:
    manifest = bundle.manifest
    graphs = {name: bundle.graph(name, "fp32") for name in COMPONENTS}
    specs = {name: manifest.components[name].spec for name in COMPONENTS}
    return Model(graphs, specs, bundle.file(manifest.tokenizer), DDIM.from_config(manifest.scheduler))


def exact(values: np.ndarray, expected: np.ndarray) -> float:
    """Signal-to-noise ratio in dB."""
    return float(10 * np.log10(np.square(expected).sum() / np.square(values - expected).sum()))


@pytest.mark.parametrize("name", COMPONENTS)
def test_onnxruntime_runs_every_chosen_layer_in_integer_kernels(int8_bundle: Bundle, name: str, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(int8_bundle.graph(name, "int8")), options)
    feed = dummy_inputs(int8_bundle.manifest.components[name].spec)
    found = session.run(None, feed)[0]
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = Counter(e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "kernel_time" in e["name"])
    chosen = part(int8_bundle, name).chosen
    assert sum(kernels[kind] for kind in INTEGER) == len(chosen) > 3, kernels
    expected = onnxruntime.InferenceSession(str(int8_bundle.graph(name, "fp32"))).run(None, feed)[0]
    assert exact(found, expected) > 10


@pytest.mark.parametrize("name", COMPONENTS)
def test_openvino_executes_every_chosen_layer_in_int8(int8_bundle: Bundle, name: str) -> None:
    spec = int8_bundle.manifest.components[name].spec
    core = openvino.Core()
    model = core.read_model(int8_bundle.graph(name, "int8"))
    feed = dummy_inputs(spec)
    model.reshape({tensor: list(array.shape) for tensor, array in feed.items()})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        facts = operation.get_rt_info()
        if facts["layerType"].get() in ("Convolution", "FullyConnected", "MatMul"):
            kinds[facts["runtimePrecision"].get()] += 1
    assert kinds["i8"] + kinds["u8"] == len(part(int8_bundle, name).chosen), kinds
    session = onnxruntime.InferenceSession(str(int8_bundle.graph(name, "fp32")))
    assert exact(next(iter(compiled(feed).values())), session.run(None, feed)[0]) > 10


@pytest.mark.parametrize("name", COMPONENTS)
def test_tensorrt_rtx_builds_it_and_its_program_computes_in_int8(
    int8_bundle: Bundle, name: str, tmp_path: Path
) -> None:
    held = part(int8_bundle, name)
    islands = [layer["name"] for layer in held.layers if not layer["int8"]]
    made = build_engine(
        int8_bundle.graph(name, "int8"),
        int8_bundle.manifest.components[name].spec,
        "int8",
        EngineRequest("tensorrt-rtx", ("8.6", "8.9", "12.0")),
        tmp_path / "engine",
        islands=islands,
    )
    assert made.proof["matrix_work"]["int8"] > 3, made.proof


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_form_of_the_graph(int8_bundle: Bundle, name: str) -> None:
    path = int8_bundle.graph(name, "int8")
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    chosen = part(int8_bundle, name).chosen
    layers = {layer.name: layer for layer in find_layers(graph)}
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not node.inputs[2].const_value.numpy().any()
        if node.op_type == "QuantizeLinear":
            assert len(node.outputs[0].uses()) == 1  # a pair of its own for each reader
        if node.name in chosen:
            given, weights = node.inputs[0].producer(), node.inputs[1].producer()
            assert (given.op_type, weights.op_type) == ("DequantizeLinear", "DequantizeLinear")
            assert weights.inputs[0].const_value.dtype == ir.DataType.INT8
            assert weights.inputs[1].shape[0] == weights.inputs[0].shape[layers[node.name].out_axis]
            if len(node.inputs) > 2:
                assert node.inputs[2].dtype == ir.DataType.FLOAT
    assert set(chosen) <= set(layers)


def test_the_same_record_gives_the_same_graphs_byte_for_byte(
    int8_bundle: Bundle, bundle_copy: Path, tmp_path: Path
) -> None:
    record = int8_bundle.file(RECORD)
    assert read_record(record).to_json() == record.read_text()
    again = calibrate(bundle_copy, record).bundle
    for name in ("text_encoder/int8.onnx", "unet/int8.onnx", "decoder/int8.onnx", RECORD):
        assert again.file(name).read_bytes() == int8_bundle.file(name).read_bytes()
    other = json.loads(record.read_text())
    other["components"]["unet"]["graph"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(BuildError, match=r"^unet: calibration\.json was made for another fp32 graph"):
        calibrate(bundle_copy, tmp_path / "other.json")


def test_weights_beside_the_graph_in_a_file_of_several_links(int8_bundle: Bundle, tmp_path: Path) -> None:
    """As a large model's lie in the work folder of a bundle that is calibrated anew."""
    ir.save(ir.load(int8_bundle.graph("unet", "fp32")), tmp_path / "fp32.onnx", external_data="fp32.onnx.data")
    (tmp_path / "second").hardlink_to(tmp_path / "fp32.onnx.data")
    held, model = part(int8_bundle, "unet"), load_graph(tmp_path / "fp32.onnx")
    insert_qdq(model, held.sources, held.results, held.chosen)
    read_when_used(model)
    save_graph(model, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").read_bytes() == int8_bundle.graph("unet", "int8").read_bytes()


def test_calibrating_again_does_nothing_and_another_budget_takes_the_rest_over(
    int8_bundle: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(int8_bundle.folder, tmp_path / "bundle")
    before = (folder / "manifest.json").read_bytes()
    again = calibrate(folder, SETTINGS)
    assert set(again.origins.values()) == {"kept"}
    assert write_report(again.bundle)[0].manifest == again.bundle.manifest
    assert (folder / "manifest.json").read_bytes() == before
    strict = calibrate(folder, replace(SETTINGS, min_psnr=18.0))
    assert strict.origins["calibration"] == "made" and strict.origins["unet.fp32"] == "kept"
    assert "int8" not in strict.bundle.manifest.measured
    strict.bundle.check()


def test_the_report_says_what_the_record_says(int8_bundle: Bundle) -> None:
    report = json.loads(int8_bundle.file("report/int8.json").read_text())
    assert report["record"]["sha256"] == int8_bundle.manifest.files[RECORD].sha256
    for name, held in report["components"].items():
        facts = part(int8_bundle, name)
        work = {layer["name"]: layer["flops"] for layer in held["layers"]}
        assert list(work) == [layer.name for layer in find_layers(load_graph(int8_bundle.graph(name, "fp32")).graph)]
        assert held["int8_share"] == pytest.approx(sum(work[layer] for layer in facts.chosen) / sum(work.values()))
        assert held["bytes_int8"] < held["bytes_fp32"]
    unet = report["components"]["unet"]
    assert unet["int8_share"] > 0.8 and unet["bytes_int8"] < 0.7 * unet["bytes_fp32"]
    assert report["summary"]["psnr_mean"] >= 15 and report["speed"]["unet_ms"]["int8"] > 0
    assert int8_bundle.manifest.measured["int8"]["unet_int8_share"] == report["components"]["unet"]["int8_share"]


def test_the_pictures_are_those_the_pipeline_draws(int8_bundle: Bundle) -> None:
    """The figures come of trials; drawn again from the finished bundle, the first picture has the same PSNR."""
    told = json.loads(int8_bundle.file("report/int8.json").read_text())["pictures"][0]
    options = {"seed": [told["seed"]], "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 3}
    pictures = []
    for precision in ("fp32", "int8"):
        with LatentDiffusionPipeline.from_bundle(int8_bundle, precision=precision, backend="onnxruntime") as pipeline:
            pictures.append(np.asarray(pipeline([told["prompt"]], **options).images[0]))
    assert psnr(*pictures) == pytest.approx(told["psnr"], abs=1.5)


def test_flops_are_those_of_torch(tiny_checkpoint: Path, int8_bundle: Bundle) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ldm_export.checkpoint.modules import load_module
    from ldm_export.graph.components import MODULES

    spec = int8_bundle.manifest.components["unet"].spec
    module = MODULES["unet"](load_module(open_checkpoint(tiny_checkpoint), "unet")).eval()
    feed = {name: array[:1] for name, array in dummy_inputs(spec).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*(torch.from_numpy(array) for array in feed.values()))
    assert part(int8_bundle, "unet").flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_layer_that_is_quantized_worse_counts_as_more_sensitive(int8_bundle: Bundle) -> None:
    held = part(int8_bundle, "unet")
    layer = held.chosen[0]
    source = next(
        one.source for one in find_layers(load_graph(int8_bundle.graph("unet", "fp32")).graph) if one.name == layer
    )
    fine = unet_sensitivity(model_of(int8_bundle), SETTINGS, held.sources, held.results, [layer])
    coarse = {**held.sources, source: Scaling(held.sources[source].threshold * 10, held.sources[source].factors)}
    rough = unet_sensitivity(model_of(int8_bundle), SETTINGS, coarse, held.results, [layer])
    assert rough[layer] < fine[layer] - 6


def test_killed_during_calibration_it_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    script = (
        "import sys; from pathlib import Path; from ldm_export.bundle.calibrate import calibrate; "
        "from ldm_calibration.settings import Settings; "
        f"calibrate(Path(sys.argv[1]), {SETTINGS!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    work = tmp_path / ".bundle.part"
    try:
        while not (work / "calibration.text_encoder.stage").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    Bundle.open(folder).check()
    assert Bundle.open(folder).precision == "fp32"
    told: list[str] = []
    built = calibrate(folder, SETTINGS, lambda stage, done, total: told.append(stage))
    assert "calibration.trajectories" not in told and "calibration.text_encoder.ranges" not in told
    assert "calibration.decoder.ranges" in told and built.bundle.precision == "int8" and not work.exists()
    built.bundle.check()


def test_a_budget_that_cannot_be_met_says_what_can_be(bundle_copy: Path) -> None:
    before = (bundle_copy / "manifest.json").read_bytes()
    with pytest.raises(
        BuildError, match=r"^unet: the budget \(90 dB\) cannot be met .*What can be: [\d.]+ dB with 8\d%.*--min-psnr"
    ) as caught:
        calibrate(bundle_copy, replace(SETTINGS, min_psnr=90.0))
    assert "\n" not in str(caught.value)
    assert (bundle_copy / "manifest.json").read_bytes() == before


def test_without_prompts_it_is_refused(bundle_copy: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    refused("calibrate", bundle_copy, said="int8 is calibrated on real prompts, got none")
    refused("build", "-o", "new", "--min-psnr", "30", said="--min-psnr: of int8; give --precision int8 too")
    refused("calibrate", tmp_path / "none", said="no such folder")
    (tmp_path / "p.txt").write_text("a red circle\n")
    for options, said in (
        (("--min-psnr", "-1"), "min psnr: got -1.0"),
        (("--max-accuracy-loss", "2"), "max accuracy loss: got 2.0"),
        (("--calibration-steps", "1"), "steps: got 1"),
        (("--trials", "0"), "--trials: got 0"),
    ):
        refused("calibrate", bundle_copy, "--prompts", "p.txt", *options, said=said)


def test_a_model_that_gives_nan_is_refused(int8_bundle: Bundle, tmp_path: Path) -> None:
    model = model_of(int8_bundle)
    damaged = ir.load(model.graphs["unet"])
    weight = damaged.graph.initializers["unet.conv_in.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e38), name=weight.name)
    ir.save(damaged, tmp_path / "unet.onnx")
    broken = replace(model, graphs={**model.graphs, "unet": tmp_path / "unet.onnx"})
    with pytest.raises(BuildError, match=r"^unet: gives NaN or infinity in fp32"):
        run_trajectories(broken, PROMPTS, 3, 0.3, 6.0)
    with pytest.raises(BuildError, match=r"^prompts: got none"):
        run_trajectories(model, [], 3, 0.3, 6.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(version=2),
        lambda d: d["components"]["unet"].update(layers=[{"name": 1}]),
        lambda d: next(iter(d["components"]["unet"]["sources"].values())).update(threshold=-1),
        lambda d: next(iter(d["components"]["unet"]["sources"].values())).update(factors=["x"]),
        lambda d: d["components"]["unet"].update(results=[]),
        lambda d: d.update(components=None),
        lambda d: d.update(pictures=[{"prompt": 1}]),
        lambda d: d.update(settings={}),
    ],
)
def test_a_damaged_record_is_told_in_one_line(
    int8_bundle: Bundle, tmp_path: Path, damage: Callable[[dict], None]
) -> None:
    document = json.loads(int8_bundle.file(RECORD).read_text())
    damage(document)
    (tmp_path / "record.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"record\.json: ") as caught:
        read_record(tmp_path / "record.json")
    assert "\n" not in str(caught.value) and isinstance(caught.value, LdmError)


def test_the_selection_releases_the_worst_for_its_work_first() -> None:
    flops = {"a": 100, "b": 100, "c": 10, "float": 40}
    order = ranked({"a": 40.0, "b": 20.0, "c": 30.0}, flops)
    assert order == ["c", "b", "a"] or order == ["b", "c", "a"]
    quality = {0: 30.0, 1: 38.0, 2: 44.0}

    def trial(layers: list[str]) -> Comparison:
        return Comparison((quality[3 - len(layers)],), (1.0,), None, None)

    assert select(order, flops, Budget(37, None), trial).layers == tuple(sorted(order[1:]))
    assert select(order, flops, Budget(30, None), trial).layers == ("a", "b", "c")
    assert select(order, flops, Budget(44, None), trial).layers == ("a",)
    failed = select(order, flops, Budget(50, None), trial)
    assert failed.layers == () and failed.tried[-1] == (0.4, 44.0)


def test_ssim_and_psnr() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    other = np.clip(one.astype(int) + rng.integers(-9, 10, one.shape), 0, 255).astype(np.uint8)
    assert psnr(one, one) is None and ssim(one, one) == pytest.approx(1)
    assert psnr(one, other) == pytest.approx(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))
    assert ssim(one, np.full_like(one, 127)) < 0.1 < 0.9 < ssim(one, other) < 1
    assert right([one], ["no sentence"]) is None and right([one], ["a red circle"]) == [False]
