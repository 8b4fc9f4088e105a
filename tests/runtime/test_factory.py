"""Components opened on an engine: which files are checked, how often, and what is freed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime import bundle as bundle_module
from ldm_runtime.backends.engine import Choice, Placement, pipeline_components, step_graphs
from ldm_runtime.backends.factory import open_component, open_model
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import graph_file, weights_file
from ldm_runtime.errors import BackendError, ManifestError
from ldm_runtime.verified_file import VerifiedFile
from tests.support.small_bundle import VARIANT, write_small_bundle


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
    assert engine.device_loop(bundle, choice, Placement("cpu", threads=1), {"unet": unet}) is None


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
