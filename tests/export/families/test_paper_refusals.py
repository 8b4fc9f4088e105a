"""Inputs that `generate` refuses: one line, exit code 1, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.paper_bundles import paper_bundle
from tests.support.png_header import png_header
from tests.support.shared import SharedFolders


def write_inputs(folder: Path) -> None:
    """Good and bad files, by the names that the cases use."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    picture.save(folder / "a.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    (folder / "huge.png").write_bytes(png_header(10_000, 10_000))
    picture.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:1500])
    (folder / "text.png").write_text("no image")
    for name, size, box in (("m", 32, (0, 0, 16, 32)), ("small", 28, (0, 0, 9, 9)), ("full", 32, (0, 0, 32, 32))):
        mask = Image.new("L", (size, size))
        mask.paste(255, box)
        mask.save(folder / f"{name}.png")
    Image.new("L", (32, 32)).save(folder / "empty.png")
    Image.new("L", (32, 32), 7).save(folder / "unknown.png")
    layouts: dict[str, Any] = {
        "outside": [["Cat", [0.5, 0.5, 0.6, 0.1]]],
        "many": [["Cat", [0, 0, 1, 1]]] * 31,
        "dog": [["Dog", [0, 0, 1, 1]]],
    }
    for name, layout in layouts.items():
        (folder / f"{name}.json").write_text(json.dumps(layout))
    (folder / "broken.json").write_text("[[")


CASES: dict[str, tuple[str, list[str], str]] = {
    "one pixel": ("bsr_sr", ["--image", "pixel.png"], "image: got 1 x 1 pixels (height, width), expected 2.."),
    "100 megapixels": ("bsr_sr", ["--image", "huge.png"], "huge.png: got 10000 x 10000 pixels, expected at most"),
    "animated": ("bsr_sr", ["--image", "moving.gif"], "moving.gif: got 2 frames, expected a single image"),
    "truncated": ("bsr_sr", ["--image", "cut.png"], "cut.png: cannot be read as an image ("),
    "no image": ("bsr_sr", ["--image", "text.png"], "text.png: cannot be read as an image ("),
    "no mask": ("inpainting_big", ["--image", "a.png"], "mask: got none, expected an image and a mask"),
    "mask of another size": ("inpainting_big", ["--image", "a.png", "--mask", "small.png"], "mask: got 28 x 28 pixels"),
    "empty mask": ("inpainting_big", ["--image", "a.png", "--mask", "empty.png"], "mask: got an empty one"),
    "full mask": ("inpainting_big", ["--image", "a.png", "--mask", "full.png"], "mask: got a full one"),
    "label": ("cin256-v2", ["--label", "10"], "labels: got 10, expected a whole number from 0 to 9"),
    "class": ("semantic_synthesis", ["--segmentation", "unknown.png"], "segmentation: got class 7, expected 0 to 6"),
    "colours": ("semantic_synthesis", ["--segmentation", "a.png"], "segmentation: got an image of mode RGB"),
    "box outside": ("layout2img", ["--layout", "outside.json"], "layout: object 0: got box (0.5, 0.5, 0.6, 0.1)"),
    "too many boxes": ("layout2img", ["--layout", "many.json"], "layout: got 31 objects, expected at most 30"),
    "category": ("layout2img", ["--layout", "dog.json"], "layout: object 0: got category 'Dog'"),
    "no JSON": ("layout2img", ["--layout", "broken.json"], "broken.json: is not JSON ("),
    "another task": ("bsr_sr", ["--image", "a.png", "--mask", "m.png"], "mask: got a value, but this super_resolution"),
    "a prompt": ("semantic_synthesis", ["a cat"], "prompts: got a value, but this semantic_synthesis model takes"),
    "a count": ("bsr_sr", ["--image", "a.png", "--count", "2"], "count: got a number, but this model's conditioning"),
    "a size": (
        "bsr_sr",
        ["--image", "a.png", "--height", "64"],
        "height: got 64, but the request's image leads to 128",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # not an error of the command line
def test_one_line(case: str, shared: SharedFolders, tmp_path: Path, refused: Callable[..., None]) -> None:
    name, options, message = CASES[case]
    write_inputs(tmp_path)
    bundle = paper_bundle(shared, name).folder / "bundle"
    refused("generate", bundle, *options, "--steps", "1", "--backend", "onnxruntime", message=message)
