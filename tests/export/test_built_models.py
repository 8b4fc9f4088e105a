"""Bundles of every kind of checkpoint draw images: configs alone, weights beside the graphs, VQ, the older layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from ldm_export.bundle.build import build
from ldm_export.families import open_checkpoint
from ldm_export.graph import onnx_graph
from ldm_export.quality.verification import verify
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.model import SHALLOW_UNET
from tests.support.checkpoints import edit_json, random_checkpoint, write_tensors
from tests.support.configs_only import write_configs


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configs(tmp_path_factory.mktemp("configs") / "small")


@pytest.fixture(scope="module")
def small_bundle(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("small") / "bundle"
    return build(open_checkpoint(configs, random_weights=True), target).bundle.folder


def built_bundle(checkpoint: Path, target: Path, **options: Any) -> Bundle:
    """Build, with every stage made anew."""
    built = build(open_checkpoint(checkpoint, **options), target)
    assert set(built.origins.values()) == {"made"}
    built.bundle.check()
    return built.bundle


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def image(bundle: Path, **options: Any) -> np.ndarray:
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", threads=1) as pipeline:
        result = pipeline("a red circle", seed=1, guidance_scale=6.0, num_inference_steps=2, **options)
    return np.asarray(result.images[0])


def test_random_weights_need_configs_only(configs: Path, small_bundle: Path) -> None:
    assert sorted(path.name for path in (configs / "tokenizer").iterdir()) == ["tokenizer_config.json"]
    assert Bundle.open(small_bundle).manifest.request["random_weights_seed"] == 0
    one, other = image(small_bundle), image(small_bundle, height=20, width=12)
    assert one.shape == (16, 16, 3) and other.shape == (20, 12, 3)
    assert one.std() > 1 and np.array_equal(one, image(small_bundle))


def test_a_bundle_of_another_version_is_rebuilt_and_weights_beside_the_graphs_move_with_it(
    configs: Path, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "INLINE_BYTES", 1000)
    target = Path(shutil.copytree(small_bundle, tmp_path / "made"))
    edit_json(target / "manifest.json", version=99)
    built_bundle(configs, target, random_weights=True)
    beside = {
        f"{name}/fp32.onnx.data"
        for name in Bundle.open(small_bundle).manifest.model.components
        if "step" not in name and name != SHALLOW_UNET  # it refers to the UNet's
    }
    assert files(tmp_path / "made") == files(small_bundle) | beside
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    assert np.array_equal(image(moved), image(small_bundle))


def test_quantised_latents_and_the_older_layout(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "older", vq=True, layout="older")
    weights = folder / "vqvae/diffusion_pytorch_model.safetensors"
    state = load_file(weights)  # a codebook as wide as the latents, so that no rounding decides between two entries
    write_tensors(weights, state | {"quantize.embedding.weight": 60 * state["quantize.embedding.weight"]})
    bundle = built_bundle(folder, tmp_path / "bundle")
    checked = verify(bundle, open_checkpoint(folder), [{"prompts": "a red circle"}, {"prompts": "a square"}], steps=3)
    assert checked.failures == []
    assert image(tmp_path / "bundle").std() > 1
