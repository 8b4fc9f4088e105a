"""Models of images, masks, layouts and CLIP's texts on a real Triton server: `client` gets the image made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_export.cli import main
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from tests.support.paper_bundles import files_of, paper_bundle
from tests.support.shared import SharedFolders
from tests.support.triton_server import served

SLOW = pytest.mark.slow  # each starts a server


@pytest.mark.parametrize(
    "name", ["inpainting_big", pytest.param("semantic_synthesis", marks=SLOW), pytest.param("layout2img", marks=SLOW)]
)
def test_images_are_those_of_the_same_request_here(name: str, shared: SharedFolders, tmp_path: Path) -> None:
    paper = paper_bundle(shared, name)
    options, fields = files_of(paper.row, tmp_path)
    with LatentDiffusionPipeline.from_bundle(paper.bundle, backend="onnxruntime", precision="fp32") as pipeline:
        (expected,) = pipeline(seed=3, num_inference_steps=4, eta=0.5, **fields).images
    with served(paper.folder / "bundle", tmp_path) as server:
        request = ["--seed", "3", "--steps", "4", "--eta", "0.5", "-o", str(tmp_path / "out.png")]
        assert main(["client", *options, *request, "--url", server.http]) == 0
    answer = np.asarray(Image.open(tmp_path / "out.png"), int)
    assert np.abs(answer - np.asarray(expected, int)).max() <= 1


@SLOW
def test_stable_diffusion(sd2_bundle: Bundle, tmp_path: Path) -> None:
    fields = {"negative_prompt": "red!", "clip_skip": 1, "guidance_rescale": 0.7, "guidance_scale": 7.5, "eta": 0.5}
    image = np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8)
    mask = np.zeros((24, 16), np.uint8)
    mask[6:20, 4:12] = 255
    fields |= {"prompt_weights": True, "prompt_chunks": 2}
    prompt = "A (café:1.3), 日! " * 20
    options = ["--negative-prompt", "red!", "--clip-skip", "1", "--guidance-rescale", "0.7", "--guidance", "7.5"]
    options += ["--prompt-weights", "--prompt-chunks", "2"]
    files = {"image": tmp_path / "a.png", "mask": tmp_path / "m.png"}
    for file, array in zip(files.values(), (image, mask), strict=True):
        Image.fromarray(array).save(file)
    starts = {"strength": 0.8, "image": Image.fromarray(image)}
    started = ["--image", str(files["image"]), "--strength", "0.8"]
    cases = (
        ({}, []),
        (starts, started),
        (
            {**starts, "mask": Image.fromarray(mask), "mask_blur": 1.5, "padding_mask_crop": 2},
            [*started, "--mask", str(files["mask"]), "--mask-blur", "1.5", "--padding-mask-crop", "2"],
        ),
    )
    with LatentDiffusionPipeline.from_bundle(sd2_bundle, backend="onnxruntime", precision="fp32") as pipeline:
        expected = [pipeline(prompt, seed=3, num_inference_steps=4, **fields, **more).images[0] for more, _ in cases]
    with served(sd2_bundle.folder, tmp_path) as server:
        request = ["--seed", "3", "--steps", "4", "--eta", "0.5", "-o", str(tmp_path / "out.png")]
        for (_, more), image_here in zip(cases, expected, strict=True):
            assert main(["client", prompt, *options, *more, *request, "--url", server.http]) == 0
            answer = np.asarray(Image.open(tmp_path / "out.png"), int)
            assert np.abs(answer - np.asarray(image_here, int)).max() <= 1


@SLOW
def test_stable_diffusion_xl(xl_bundle: Bundle, tmp_path: Path) -> None:
    fields = {
        "prompts_2": "green",
        "negative_prompt": "red!",
        "original_size": (40, 24),
        "crops_coords_top_left": (1, 2),
    }
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    started = ["--image", str(tmp_path / "a.png"), "--strength", "0.8"]
    with LatentDiffusionPipeline.from_bundle(xl_bundle, backend="onnxruntime", precision="fp32") as pipeline:
        common: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, **fields}
        expected = [pipeline("a photo", **common, **more).images[0] for more in ({}, {"image": image, "strength": 0.8})]
    with served(xl_bundle.folder, tmp_path) as server:
        options = ["--prompt-2", "green", "--negative-prompt", "red!", "--original-size", "40", "24"]
        request = ["--crops-coords-top-left", "1", "2", "--seed", "3", "--steps", "4", "-o", str(tmp_path / "out.png")]
        for more, image_here in zip(([], started), expected, strict=True):
            assert main(["client", "a photo", *options, *more, *request, "--url", server.http]) == 0
            answer = np.asarray(Image.open(tmp_path / "out.png"), int)
            assert np.abs(answer - np.asarray(image_here, int)).max() <= 1
