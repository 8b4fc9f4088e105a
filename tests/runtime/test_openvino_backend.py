"""The OpenVINO backend against ONNX Runtime: exact in fp32, close in bf16, compiled once for each set of shapes."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline, LdmError
from ldm_runtime.backends import openvino as module
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.openvino import OpenVinoBackend, has_bf16
from ldm_runtime.installation import install_command
from ldm_runtime.once import once
from ldm_runtime.specs import dummy_inputs
from tests.support.small_bundle import write_small_bundle

COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder")
FAST = "bf16" if has_bf16() else "fp32"
PROMPTS = ["a large red circle in the center on a white background", "a small blue cross"]
OPTIONS = {"seed": 3, "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 10}


def all_images(bundle: Path, **options: object) -> np.ndarray:
    with LatentDiffusionPipeline.from_bundle(bundle, **options) as pipeline:
        return np.stack([np.asarray(image) for image in pipeline(PROMPTS, **OPTIONS).images]).astype(int)


@pytest.fixture(scope="module")
def exact(shapes_bundle: Path) -> np.ndarray:
    return all_images(shapes_bundle, backend="onnxruntime", precision="fp32")


@pytest.mark.parametrize("which", ["min", "opt"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_equals_onnxruntime(tiny_bundle: Path, name: str, which: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph, spec = bundle.graph(name, "fp32"), bundle.manifest.components[name].spec
    backend, other = OpenVinoBackend(graph, spec, threads=2), OnnxRuntimeBackend(graph, spec, "cpu", 2)
    feed = dummy_inputs(spec, which, seed=5)
    for ours, theirs in zip(backend.run(feed).values(), other.run(feed).values(), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 2e-5 * max(1.0, np.abs(theirs).max())


def test_the_same_image_in_fp32(shapes_bundle: Path, exact: np.ndarray) -> None:
    assert np.abs(all_images(shapes_bundle, backend="openvino", precision="fp32") - exact).max() <= 1


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 arithmetic")
def test_a_close_image_in_bf16(shapes_bundle: Path, exact: np.ndarray) -> None:
    rounded = all_images(shapes_bundle, backend="openvino")
    assert np.abs(rounded - exact).max() > 1, "bf16 was asked for and fp32 computed"
    assert 10 * np.log10(255**2 / np.square(rounded - exact).mean()) >= 30


def test_results_are_the_callers_and_shapes_are_kept(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec = bundle.manifest.components["decoder"].spec
    backend = OpenVinoBackend(bundle.graph("decoder", "fp32"), spec, cache=tmp_path / "cache")
    compiled: list[object] = []
    backend._shaped.max_requests = 2
    monkeypatch.setattr(backend._shaped, "_core", Counting(backend._core, compiled))
    feeds = [dummy_inputs(spec, "min", seed) for seed in (1, 2)]
    first = backend.run(feeds[0])["image"]
    copy = first.copy()
    assert not np.array_equal(backend.run(feeds[1])["image"], copy) and np.array_equal(first, copy)
    assert len(compiled) == 1
    wide = {"latents": np.ones((1, feeds[0]["latents"].shape[1], 3, 5), np.float32)}
    narrow = backend.run(wide)["image"]
    assert len(compiled) == 2
    backend.run({"latents": wide["latents"][..., :4]})  # the third: from here on one for any shape
    assert np.abs(backend.run(wide)["image"] - narrow).max() < 1e-5
    assert np.abs(backend.run(feeds[0])["image"] - copy).max() < 1e-5
    assert len(compiled) == 3
    assert list((tmp_path / "cache").glob("*.blob"))


def test_calls_are_filled_up_to_the_rows_of_a_compiled_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    backend = OpenVinoBackend(bundle.graph("unet", "fp32"), bundle.manifest.components["unet"].spec, threads=1)
    compiled: list[object] = []
    monkeypatch.setattr(backend._shaped, "_core", Counting(backend._core, compiled))
    rng = np.random.default_rng(0)
    feed = {
        "sample": rng.standard_normal((8, 4, 4, 4)).astype(np.float32),
        "time_embedding": rng.standard_normal((8, 8)).astype(np.float32),
    }
    expected = backend.run(feed)["noise_pred"]
    backend._shaped.max_requests = 1
    for rows, compilations in ((6, 1), (7, 1), (2, 2), (5, 2), (8, 2)):  # 5 and 2 rows: by the graph for any shape
        got = backend.run({name: array[:rows] for name, array in feed.items()})["noise_pred"]
        assert got.shape == (rows, 4, 4, 4) and np.allclose(got, expected[:rows], atol=1e-5)
        assert len(compiled) == compilations
    tall = {"sample": np.concatenate([feed["sample"]] * 2, axis=2)[:6], "time_embedding": feed["time_embedding"][:6]}
    assert backend.run(tall)["noise_pred"].shape == (6, 4, 8, 4) and len(compiled) == 2


class Counting:
    """OpenVINO's core, with its compilations counted."""

    def __init__(self, core: object, compiled: list[object]):
        self._core, self._compiled = core, compiled

    def __getattr__(self, name: str) -> object:
        if name == "compile_model":
            self._compiled.append(name)
        return getattr(self._core, name)


def test_arrays_that_stay_the_same_over_many_runs_are_taken_once_and_changes_are_seen(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph, spec = bundle.graph("unet", "fp32"), bundle.manifest.components["unet"].spec
    backend = OpenVinoBackend(graph, spec, threads=1)
    feed = dummy_inputs(spec, "opt", seed=4)
    expected = backend.run(feed)["noise_pred"]
    name = next(tensor.name for tensor in spec.inputs if tensor.name.startswith("kv."))
    frozen = {key: array.copy() for key, array in feed.items()}
    for array in frozen.values():
        array.flags.writeable = False
    for inputs in (feed, frozen, feed):  # the same arrays, others with the same values, and the first ones again
        assert np.array_equal(backend.run(inputs)["noise_pred"], expected)
    changed = {**feed, name: feed[name] + 1}
    assert not np.array_equal(backend.run(changed)["noise_pred"], expected)
    assert np.array_equal(backend.run(feed)["noise_pred"], expected)
    with pytest.raises(LdmError, match="got inputs"):
        backend.run({**feed, "context": feed["sample"]})


def test_what_cannot_be_loaded(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec, other = (bundle.manifest.components[name].spec for name in ("decoder", "unet"))
    graph = bundle.graph("decoder", "fp32")
    (tmp_path / "torn.onnx").write_bytes(graph.read_bytes()[:400])
    with pytest.raises(LdmError, match=r"^decoder: openvino cannot load .*torn\.onnx"):
        OpenVinoBackend(tmp_path / "torn.onnx", spec)
    with pytest.raises(LdmError, match=r"inputs are \['latents'\], the manifest says"):
        OpenVinoBackend(graph, other)
    with pytest.raises(LdmError, match="arithmetic: got 'fp8'"):
        OpenVinoBackend(graph, spec, "fp8")
    monkeypatch.setattr(module, "core", once(inspect.unwrap(module.core)))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(LdmError, match=re.escape(install_command("openvino"))):
        OpenVinoBackend(graph, spec)
