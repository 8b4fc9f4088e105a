"""An engine of the caller's own, and the next engine in place of one that fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.backends import selection
from ldm_runtime.backends.engine import Engine
from ldm_runtime.backends.factory import open_component
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.backends.registry import BACKENDS
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import BackendError
from ldm_runtime.request import Request
from tests.support.numpy_engine import NumpyEngine
from tests.support.small_bundle import write_small_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_small_bundle(tmp_path / "bundle")


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
