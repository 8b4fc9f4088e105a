"""Components opened on an engine: which files are checked, how often, and an engine of the caller's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime import bundle as bundle_module
from ldm_runtime.backends import Feed, SpecBackend, selection
from ldm_runtime.backends.engine import Choice, Engine, Loader, Placement, Wish, pipeline_components, step_graphs
from ldm_runtime.backends.factory import open_component, open_model
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.backends.registry import BACKENDS
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import graph_file, weights_file
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.errors import BackendError, ManifestError
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec
from ldm_runtime.verified_file import VerifiedFile
from tests.support.small_bundle import VARIANT, write_small_bundle

FOLDER_ONLY = Placement("cpu", threads=1)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_small_bundle(tmp_path / "bundle")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file is hashed, by its path in the bundle."""
    counts: Counter[str] = Counter()
    verify = bundle_module.verify

    def counted(path: Path, sha256: str, size: int) -> VerifiedFile:
        counts[str(Path(*path.parts[-2:]))] += 1
        return verify(path, sha256, size)

    monkeypatch.setattr(bundle_module, "verify", counted)
    return counts


def test_the_pipeline_runs_all_components_except_the_step_graphs(bundle: Bundle) -> None:
    model = bundle.manifest.model
    assert pipeline_components(model) == ("time_embedding", "unet", "decoder") and step_graphs(model) == ("step",)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_file_is_hashed_once_and_loaded_on_first_use(bundle: Bundle, hashed: Counter[str], backend: str) -> None:
    opened = open_model(bundle, backend, device="cpu", threads=1)
    unet = graph_file("unet", "fp32", VARIANT if backend == "onnxruntime" else "")
    assert hashed == {"time_embedding/fp32.onnx": 1, unet: 1, "decoder/fp32.onnx": 1}
    assert not any(one.is_loaded for one in opened.backends.values()) and opened.loop is None
    latents = np.zeros((1, 4, 4, 4), np.float32)
    assert opened.backends["decoder"].run({"latents": latents})["image"].shape == (1, 3, 8, 8)
    assert [name for name, one in opened.backends.items() if one.is_loaded] == ["decoder"]
    opened.backends["decoder"].close()
    assert not opened.backends["decoder"].is_loaded and set(hashed.values()) == {1}


def test_the_loop_on_cuda_hashes_only_the_step_graphs(bundle: Bundle, hashed: Counter[str]) -> None:
    engine, placement = OnnxRuntimeEngine(), Placement("cuda")
    choice = Choice("onnxruntime", "cuda", "fp32", "fp32", 0, "")
    unet = LazyBackend(bundle.manifest.components["unet"].spec, engine.open(bundle, "unet", choice, placement))
    assert engine.device_loop(bundle, choice, placement, {"unet": unet}) is not None
    assert hashed == {"unet/fp32.onnx": 1, "step/fp32.onnx": 1}
    assert engine.device_loop(bundle, choice, FOLDER_ONLY, {"unet": unet}) is None


def test_one_component_is_opened_without_the_others(bundle: Bundle, hashed: Counter[str]) -> None:
    (bundle.folder / "unet/fp32.onnx").write_bytes(b"damaged")
    backend = open_component(bundle, "decoder", "onnxruntime", device="cpu", threads=1)
    assert hashed == {"decoder/fp32.onnx": 1} and isinstance(backend.load(), OnnxRuntimeBackend)
    assert backend.run({"latents": np.zeros((2, 4, 4, 4), np.float32)})["image"].shape == (2, 3, 8, 8)
    with pytest.raises(ManifestError, match=r"unet/fp32\.onnx: got 7 bytes"):
        open_component(bundle, "unet", "openvino")
    with pytest.raises(BackendError, match="got component 'vae', expected one of time_embedding, unet, decoder, step"):
        open_component(bundle, "vae")


def test_weights_that_a_variant_shares_with_the_portable_graph_are_checked(bundle: Bundle) -> None:
    names = weights_file(graph_file("unet", "fp32")), graph_file("unet", "fp32", VARIANT)
    weights, variant = (bundle.folder / name for name in names)
    weights.write_bytes(b"8 bytes.")
    tensor = TensorProto(name="shared", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=weights.name)
    model = onnx.load(variant)
    model.graph.initializer.append(tensor)
    variant.write_bytes(model.SerializeToString())
    files = {**bundle.manifest.files, **file_facts(bundle.folder, names)}
    shared = replace(bundle, manifest=replace(bundle.manifest, files=files))
    assert shared.graph("unet", "fp32", VARIANT).name == f"fp32.{VARIANT}.onnx"
    weights.write_bytes(b"damaged.")
    with pytest.raises(ManifestError, match=r"unet/fp32\.onnx\.data: got sha256"):
        open_model(shared, "onnxruntime", device="cpu")


def test_a_damaged_file_is_refused_before_anything_is_loaded(bundle: Bundle) -> None:
    (bundle.folder / "decoder/fp32.onnx").write_bytes(b"damaged")
    with pytest.raises(ManifestError, match=r"decoder/fp32\.onnx: got 7 bytes"):
        open_model(bundle, "onnxruntime", device="cpu")


def test_both_engines_of_the_cpu_generate_the_same_image(bundle: Bundle, tmp_path: Path) -> None:
    images = []
    for backend in ("onnxruntime", "openvino"):
        options = {"backend": backend, "precision": "fp32", "device": "cpu", "threads": 1, "cache": tmp_path / "cache"}
        with LatentDiffusionPipeline.from_bundle(bundle, **options) as pipeline:
            images.append(np.asarray(pipeline(count=2, seed=1).images[1], int))
    assert np.abs(images[0] - images[1]).max() <= 1 and images[0].std() > 1
    assert len(list((tmp_path / "cache").iterdir())) == 3  # a folder for each graph that OpenVINO compiled


@pytest.mark.parametrize("keep", [True, False])
def test_the_pipeline_frees_what_it_has_used_on_request(bundle: Bundle, keep: bool) -> None:
    with LatentDiffusionPipeline.from_bundle(bundle, backend="openvino", keep_loaded=keep, threads=1) as pipeline:
        backends = pipeline.backends.values()
        assert pipeline.choice is not None and pipeline.choice.backend == "openvino"
        assert not any(isinstance(one, LazyBackend) and one.is_loaded for one in backends)
        first = pipeline(count=1, seed=1)
        assert [isinstance(one, LazyBackend) and one.is_loaded for one in backends] == [keep] * 3
        again = pipeline(count=1, seed=1)
        assert first.images[0].tobytes() == again.images[0].tobytes()


def test_a_text_is_encoded_once_and_alone(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LatentDiffusionPipeline.from_bundle(tiny_bundle, precision="fp32", threads=1) as pipeline:
        rows: list[int] = []
        encoder = pipeline.backends["text_encoder"]
        run = encoder.run
        monkeypatch.setattr(encoder, "run", lambda feed: rows.append(len(feed["input_ids"])) or run(feed))
        options = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 3.0}
        together = pipeline(["a red circle", "a blue square"], **options)
        assert rows == [1, 1, 1]
        pipeline(["a blue square", "a red circle"], **options)
        assert rows == [1, 1, 1]
        assert len(together.images) == 2


class NumpyBackend(SpecBackend):
    """Computes a component of the small bundle's shapes in NumPy: the mean over channels, repeated as needed."""

    def __init__(self, spec: ComponentSpec, engine: NumpyEngine):
        self._spec, self._engine, self._calls = spec, engine, engine.calls

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        self._calls.append(self._spec.name)
        self._engine.fail(f"run {self._spec.name}")
        if self._spec.name == "time_embedding":
            return {"time_embedding": np.ones((len(feed["timestep"]), 8), np.float32)}
        if self._spec.name == "unet":
            return {"noise_pred": np.zeros_like(feed["sample"])}
        mean = feed["latents"].mean(1, keepdims=True).repeat(3, 1).repeat(2, 2).repeat(2, 3)
        return {"image": np.clip(mean, 0, 1)}

    def close(self) -> None:
        self._calls.append(f"close {self._spec.name}")


class NumpyEngine:
    """An engine that no module of the package knows.

    Args:
        fails: "load <component>" or "run <component>" for a failure there, "open" for one before anything is loaded, or
            "loop" for a loop that cannot start.
    """

    name, extra = "numpy", ""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, list[str]()

    def available(self) -> str | None:
        return None

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        if wish.precision not in (None, "fp32"):
            raise BackendError(f"numpy: got precision {wish.precision}, expected fp32")
        yield Choice(self.name, "cpu", "fp32", "fp32", 0, "the only one")

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        bundle.graph(component, choice.graph)
        assert placement == FOLDER_ONLY
        self.fail("open")

        def load() -> NumpyBackend:
            self.fail(f"load {component}")
            return NumpyBackend(bundle.manifest.components[component].spec, self)

        return load

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        if self.fails != "loop":
            return None

        def no_device() -> LoopDevice:
            self.fail("loop")
            raise AssertionError

        return DeviceLoop(no_device)

    def fail(self, place: str) -> None:
        if place == self.fails:
            raise BackendError(f"{place}: no memory")


def test_an_engine_of_the_callers_own_generates_an_image(bundle: Bundle) -> None:
    engine = NumpyEngine()
    assert isinstance(engine, Engine)
    with LatentDiffusionPipeline.from_bundle(bundle, backend=engine, threads=1) as pipeline:
        assert pipeline.choice is not None and pipeline.choice.facts()["reason"] == "as asked"
        result = pipeline(count=1, seed=3, num_inference_steps=2)
    mean = np.clip(result.latents.mean(1), 0, 1)[0].repeat(2, 0).repeat(2, 1)
    pixels = np.asarray(result.images[0], np.float32) / 255
    assert np.abs(pixels - mean[..., None]).max() <= 0.5 / 255 + 1e-6
    assert engine.calls[:4] == ["time_embedding", "unet", "unet", "decoder"]
    assert {"close unet", "close decoder", "close time_embedding"} <= set(engine.calls)
    with pytest.raises(BackendError, match="numpy: got precision fp16, expected fp32"):
        LatentDiffusionPipeline.from_bundle(bundle, backend=engine, precision="fp16")


@pytest.mark.parametrize(
    ("fails", "used"),
    [
        ("open", []),
        ("load time_embedding", []),
        ("load unet", ["time_embedding"]),
        ("load decoder", ["time_embedding", "unet", "unet"]),
        ("run time_embedding", ["time_embedding"]),
        ("run unet", ["time_embedding", "unet"]),
        ("run decoder", ["time_embedding", "unet", "unet", "decoder"]),
        ("loop", []),
    ],
)
def test_auto_replaces_an_engine_that_fails_before_it_has_run(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str, used: list[str]
) -> None:
    caplog.set_level("WARNING")
    engine = NumpyEngine(fails)
    monkeypatch.setitem(BACKENDS, "numpy", engine)  # type: ignore[misc]
    request = {"count": 1, "seed": 1, "num_inference_steps": 2}
    with LatentDiffusionPipeline.from_bundle(bundle, threads=1, precision="fp32") as pipeline:
        assert pipeline.choice is not None and pipeline.choice.backend == ("openvino" if fails == "open" else "numpy")
        image = pipeline(**request).images[0]
        assert pipeline.choice.backend == "openvino" and pipeline.loop is None
        assert f"numpy cannot be used: {fails}: no memory" in pipeline.choice.reason
        again = pipeline(**request).images[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"numpy cannot be used: {fails}: no memory; openvino runs the model instead"
    ]
    assert [call for call in engine.calls if not call.startswith("close")] == used
    assert sorted(f"close {name}" for name in set(used)) == sorted(set(engine.calls) - set(used))
    with LatentDiffusionPipeline.from_bundle(bundle, threads=1, precision="fp32", backend="openvino") as alone:
        expected = alone(**request).images[0]
    assert again.tobytes() == expected.tobytes()
    if fails in ("open", "loop") or "time_embedding" in fails:  # otherwise a part of the first image is NumPy's
        assert image.tobytes() == expected.tobytes()


def test_an_engine_that_has_run_is_not_replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NumpyEngine()
    monkeypatch.setitem(BACKENDS, "numpy", engine)  # type: ignore[misc]
    with LatentDiffusionPipeline.from_bundle(bundle, threads=1) as pipeline:
        pipeline(count=1, num_inference_steps=1)
        engine.fails = "run unet"
        with pytest.raises(BackendError, match="run unet: no memory"):
            pipeline(count=1, num_inference_steps=1)
        assert pipeline.choice is not None and pipeline.choice.backend == "numpy"


@pytest.mark.parametrize("fails", ["open", "load unet", "run decoder", "loop"])
def test_an_engine_that_is_named_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setitem(BACKENDS, "numpy", NumpyEngine(fails))  # type: ignore[misc]
    with (
        pytest.raises(BackendError, match=f"^{fails}: no memory$"),
        LatentDiffusionPipeline.from_bundle(bundle, backend="numpy", threads=1) as pipeline,
    ):
        pipeline(count=1, num_inference_steps=1)


def test_the_last_engine_fails_with_its_own_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BACKENDS", {"numpy": NumpyEngine("load unet")})
    with LatentDiffusionPipeline.from_bundle(bundle, threads=1) as pipeline:
        for _ in range(2):  # the second call tries again
            with pytest.raises(BackendError, match=r"^load unet: no memory$"):
                pipeline(count=1, num_inference_steps=1)


def test_one_component_goes_on_to_the_next_engine_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "numpy", NumpyEngine("load decoder"))  # type: ignore[misc]
    backend = open_component(bundle, "decoder", threads=1)
    assert isinstance(backend.load(), OpenVinoBackend)


def test_the_batch_scheduler_goes_on_to_the_next_engine_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "numpy", NumpyEngine("loop"))  # type: ignore[misc]
    with LatentDiffusionPipeline.from_bundle(bundle, threads=1) as pipeline:
        assert pipeline.loop is not None
        with BatchScheduler(pipeline) as scheduler:
            image = scheduler.submit(Request(count=1, seed=1)).result(60).images[0]
        assert pipeline.loop is None and pipeline.choice is not None and pipeline.choice.backend == "openvino"
        assert image.std() > 1
