"""int8, fp16 and reports of models that are conditioned on labels, images, masks, segmentations and layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_calibration.inputs import InputFile, read_inputs
from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.engine.request import EngineRequest
from ldm_export.verbs.int8_options import default_requests
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.errors import SpecError
from tests.support.paper_bundles import BUILT, PaperBundle, files_of, paper_bundle
from tests.support.shared import SharedFolders

FILES = {"bsr_sr": 1, "inpainting_big": 2, "semantic_synthesis": 1, "cin256-v2": 0, "layout2img": 0}
"""Files of an input, whose digests the record of a calibration names."""
QUICK = ["--calibration-steps", "2", "--trials", "1", "--trial-steps", "2", "--sensitivity", "results"]


@pytest.fixture(
    scope="module",
    params=[
        "inpainting_big",
        *(pytest.param(name, marks=pytest.mark.slow) for name in BUILT if name != "inpainting_big"),
    ],
)
def paper(request: pytest.FixtureRequest, shared: SharedFolders) -> PaperBundle:
    return paper_bundle(shared, request.param)


def inputs_folder(paper: PaperBundle, folder: Path) -> Path:
    """The row's inputs as ``--inputs`` takes them."""
    folder.mkdir()
    files_of(paper.row, folder)
    if paper.row.name == "cin256-v2":
        (folder / "labels.txt").write_text("7\n")
    if (folder / "mask.png").exists():
        (folder / "mask.png").rename(folder / "picture_mask.png")
    return folder


def test_int8_is_calibrated_on_inputs_and_reported(
    paper: PaperBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(paper.folder / "bundle", tmp_path / "bundle"))
    inputs = inputs_folder(paper, tmp_path / "inputs")
    assert main(["calibrate", str(folder), "--inputs", str(inputs), *QUICK, "--min-psnr", "5", "--json"]) == 0
    request = json.loads((folder / "calibration.json").read_text())["settings"]["requests"][0]
    files = [value["sha256"] for value in request.values() if isinstance(value, dict)]
    assert len(files) == FILES[paper.row.name]
    assert str(tmp_path) not in (folder / "calibration.json").read_text()
    bundle = Bundle.open(folder)
    _, fields = files_of(paper.row, tmp_path)
    with LatentDiffusionPipeline.from_bundle(bundle, precision="int8", backend="onnxruntime") as pipeline:
        (image,) = pipeline(seed=0, num_inference_steps=2, **fields).images
    assert np.asarray(image).std() > 1
    capsys.readouterr()
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html"), "--steps", "2"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert ("<th>input</th>" in page) == (FILES[paper.row.name] > 0)


@pytest.mark.parametrize("name", ["inpainting_big", "layout2img"])
def test_half_precision(name: str, shared: SharedFolders, tmp_path: Path) -> None:
    paper = paper_bundle(shared, name)
    folder = Path(shutil.copytree(paper.folder / "bundle", tmp_path / "bundle"))
    bundle = build(paper.checkpoint(), folder, "fp16").bundle
    options: dict[str, Any] = {**paper.row.options, "seed": 0, "num_inference_steps": 4}
    images = {}
    for precision in ("fp32", "fp16"):
        with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime") as pipeline:
            images[precision] = pipeline(**options).arrays
    assert 0 < np.abs(images["fp16"] - images["fp32"]).mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_engines(name: str, shared: SharedFolders, tmp_path: Path) -> None:
    paper = paper_bundle(shared, name)
    folder = Path(shutil.copytree(paper.folder / "bundle", tmp_path / "bundle"))
    built = build(paper.checkpoint(), folder, "fp16", EngineRequest("tensorrt-rtx", ("8.9",))).bundle
    for component in built.manifest.components.values():
        (engine,) = component.engines
        assert engine.compute_capabilities == ("8.9",)
    assert built.manifest.components["unet"].engines[0].precision == "fp16"


def test_int8_without_inputs_is_refused(shared: SharedFolders, refused: Any) -> None:
    bundle = paper_bundle(shared, "inpainting_big").folder / "bundle"
    refused(
        "calibrate", bundle, message="--inputs: int8 is calibrated on real inputs, got none; give a folder of images"
    )
    refused("calibrate", bundle, "--inputs", "none", message="none: no such folder, expected images, and the mask of")


def test_folders_of_inputs(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    with pytest.raises(SpecError, match=r"b.jpg: has no mask, expected b_mask.png beside it"):
        read_inputs(tmp_path, "masked_image")
    with pytest.raises(SpecError, match=r"got no inputs, expected JSON files"):
        read_inputs(tmp_path, "layout")
    with pytest.raises(SpecError, match=r"labels.txt: cannot be read"):
        read_inputs(tmp_path, "label")
    Image.new("L", (8, 8)).save(tmp_path / "b_mask.png")
    (request,) = read_inputs(tmp_path, "masked_image")
    assert [Path(value.path).name for value in request.values()] == ["b.jpg", "b_mask.png"]
    assert all(isinstance(value, InputFile) for value in request.values())
    (tmp_path / "labels.txt").write_text("7\n3\n")
    assert read_inputs(tmp_path, "label") == ({"labels": 7}, {"labels": 3})
    (tmp_path / "a.json").write_text('[["Cat", [0, 0, 1, 1]]]')
    assert read_inputs(tmp_path, "layout") == ({"layout": [["Cat", [0, 0, 1, 1]]]},)
    (tmp_path / "c.png").write_bytes(b"x")
    with pytest.raises(SpecError, match=r"c.png: cannot be read as an image"):
        read_inputs(tmp_path, "image")


def test_labels_are_spread_over_all_classes() -> None:
    first, second = default_requests(("label",), None, 4, 2, classes=1000)
    assert [request["labels"] for request in first] == [0, 250, 500, 750]
    assert [request["labels"] for request in second] == [0, 500]
