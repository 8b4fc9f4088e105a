"""The authors' own images come out of bundles of their checkpoints.

The checkpoints are in a folder named by the environment variable LDM_ORIGINALS: for each kind ``KIND.ckpt``,
``KIND.yaml`` and ``KIND.npz`` with initial latents, inputs and images, written by CompVis/latent-diffusion itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle.build import build
from ldm_export.originals import open_original
from ldm_runtime.pipeline import LatentDiffusionPipeline

FOLDER = os.environ.get("LDM_ORIGINALS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LDM_ORIGINALS names no folder of original checkpoints")


def inputs(kind: str, stored: Any) -> dict[str, Any]:
    scale = json.loads(str(stored["meta"]))["scale"]
    return {
        "text2img": lambda: {"prompts": [str(one) for one in stored["prompt"]], "guidance_scale": scale},
        "class": lambda: {"labels": [int(one) for one in stored["label"]], "guidance_scale": scale},
        "uncond": lambda: {"count": len(stored["x_T"])},
        "sr": lambda: {"image": stored["low_res"]},
        "inpaint": lambda: {"image": stored["image"], "mask": stored["mask"]},
    }[kind]()


@pytest.mark.parametrize("kind", ["text2img", "class", "uncond", "sr", "inpaint"])
def test_images_are_the_authors(kind: str, tmp_path: Path) -> None:
    source = Path(FOLDER)
    vocabulary = source / f"{kind}.vocab.txt"
    tokenizer = vocabulary if vocabulary.exists() else None
    build(open_original(source / f"{kind}.ckpt", source / f"{kind}.yaml", tokenizer), tmp_path / "bundle")
    stored: Any = np.load(source / f"{kind}.npz")
    with LatentDiffusionPipeline.from_bundle(tmp_path / "bundle", backend="onnxruntime") as pipeline:
        for steps in (10, 30):
            options = {"latents": stored["x_T"], "eta": 0.0, "num_inference_steps": steps}
            images = pipeline(**options, **inputs(kind, stored)).arrays
            expected = stored[f"inpainted_{steps}" if kind == "inpaint" else f"image_{steps}"]
            assert np.abs(images - expected).max() < 1 / 255
