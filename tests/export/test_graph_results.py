"""Exported graphs in ONNX Runtime compute what the torch modules compute, at any batch and size, wherever they lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from ldm_export.families.text_to_image import TEXT_TO_IMAGE, ModelShape
from ldm_export.graph import onnx_graph
from ldm_export.graph.onnx_graph import export_graph
from ldm_export.graph.wrappers import UNet
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.model import Latents
from ldm_runtime.specs import Axis, ComponentSpec
from tests.support.configs_only import random_unet
from tests.support.whole_unet import SPLIT, run_unet

NAMES = tuple(TEXT_TO_IMAGE.components)
SIZES = [(1, 2, 2), (2, 8, 8), (3, 9, 11), (1, 5, 16), (4, 2, 7), (32, 3, 3)]  # batch, height, width


@pytest.fixture(scope="module")
def specs(tiny_bundle: Path) -> dict[str, ComponentSpec]:
    manifest = Bundle.open(tiny_bundle).manifest
    return {name: manifest.components[name].spec for name in (*NAMES, *SPLIT)}


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path) -> dict[str, ComponentSpec]:
    """Specs of the traced components, before anything is split off."""
    return dict(TEXT_TO_IMAGE.describe(open_checkpoint(tiny_checkpoint)).components)


@pytest.fixture(scope="module")
def modules(tiny_checkpoint: Path) -> dict[str, nn.Module]:
    checkpoint = open_checkpoint(tiny_checkpoint)
    return {name: TEXT_TO_IMAGE.components[name].wrap(load_module(checkpoint, name)).eval() for name in NAMES}


@pytest.fixture(scope="module")
def backends(tiny_bundle: Path, specs: dict[str, ComponentSpec]) -> Iterator[dict[str, OnnxRuntimeBackend]]:
    loaded = {
        name: OnnxRuntimeBackend(tiny_bundle / name / "fp32.onnx", spec, "cpu", threads=1)
        for name, spec in specs.items()
    }
    yield loaded
    for backend in loaded.values():
        backend.close()


def feed_of(spec: ComponentSpec, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs of the given sizes: tokens of the whole vocabulary, timesteps from start to end."""
    rng = np.random.default_rng(seed)
    feed = {}
    for tensor in spec.inputs:
        shape = [sizes[dim.name] * dim.scale if isinstance(dim, Axis) else dim for dim in tensor.shape]
        high = 1000 if tensor.name == "timestep" else 50
        values = rng.integers(0, high, shape) if tensor.dtype == "int64" else rng.standard_normal(shape)
        feed[tensor.name] = values.astype(tensor.dtype)
    return feed


Runs = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def assert_equals_torch(run: Runs, module: nn.Module, feed: Mapping[str, np.ndarray]) -> None:
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in feed.values())).numpy()
    got = next(iter(run(feed).values()))
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert expected.std() > 0.01


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_text_encoder_equals_torch(backends, modules, specs, batch: int) -> None:
    feed = feed_of(specs["text_encoder"], batch, batch=batch)
    assert_equals_torch(backends["text_encoder"].run, modules["text_encoder"], feed)


@pytest.mark.parametrize("name", ["unet", "decoder"])
@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_images_of_any_size_equal_torch(
    backends, modules, whole, name: str, batch: int, height: int, width: int
) -> None:
    feed = feed_of(whole[name], batch + height, batch=batch, height=height, width=width)
    run = partial(run_unet, backends) if name == "unet" else backends[name].run
    assert_equals_torch(run, modules[name], feed)


@pytest.mark.slow
def test_four_levels_of_any_size_equal_torch(tmp_path: Path) -> None:
    spec = ModelShape(5, 24, Latents(4, 8), latent_size=8, image_channels=3).specs()["unet"]
    module = UNet(random_unet(4, 0)).eval().requires_grad_(False)
    export_graph(module, spec, tmp_path / "unet.onnx")
    backend = OnnxRuntimeBackend(tmp_path / "unet.onnx", spec, "cpu", threads=1)
    for seed, (batch, height, width) in enumerate(SIZES):
        assert_equals_torch(backend.run, module, feed_of(spec, seed, batch=batch, height=height, width=width))
    backend.close()


def test_each_sample_has_a_timestep_of_its_own(backends, whole) -> None:
    feed = feed_of(whole["unet"], 7, batch=4, height=9, width=6)
    feed["sample"][:], feed["context"][:] = feed["sample"][0], feed["context"][0]
    feed["timestep"] = np.array([0, 1, 500, 999])
    together = run_unet(backends, feed)["noise_pred"]
    for row in range(4):
        alone = run_unet(backends, {key: array[row : row + 1] for key, array in feed.items()})["noise_pred"]
        assert np.abs(together[row] - alone[0]).max() <= 1e-5 * np.abs(alone).max()
        assert all(np.abs(together[row] - together[other]).max() > 1e-3 for other in range(row))


def test_large_weights_lie_beside_the_graph(
    modules, specs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backends
) -> None:
    monkeypatch.setattr(onnx_graph, "INLINE_BYTES", 1000)
    (tmp_path / "made").mkdir()
    graph, data = export_graph(modules["text_encoder"], specs["text_encoder"], tmp_path / "made" / "fp32.onnx")
    assert [graph.name, data.name] == ["fp32.onnx", "fp32.onnx.data"]
    assert set(graph.parent.iterdir()) == {graph, data}
    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    outside = [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {data.name}
    assert max(tensor.ByteSize() for tensor in tensors) < 1000 < data.stat().st_size
    moved = Path(shutil.move(graph.parent, tmp_path / "moved")) / graph.name
    onnx.checker.check_model(str(moved), full_check=True)
    feed = feed_of(specs["text_encoder"], batch=3)
    backend = OnnxRuntimeBackend(moved, specs["text_encoder"], "cpu", threads=1)
    assert np.array_equal(backend.run(feed)["context"], backends["text_encoder"].run(feed)["context"])
    backend.close()
