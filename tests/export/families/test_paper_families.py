"""Class-conditional, super-resolution, inpainting, semantic and layout models: bundles, verification and scheduling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_export.cli import main
from ldm_export.quality.verification import verify
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import SpecError
from ldm_runtime.images import to_uint8
from tests.support.paper_bundles import BUILT, PaperBundle, files_of, paper_bundle
from tests.support.paper_models import STEPS, assert_equal
from tests.support.shared import SharedFolders
from tests.support.torch_pipeline import torch_pipeline

FIELDS = {
    "cin256-v2": {"labels": 3},
    "bsr_sr": {"image": [[[[0, 0, 0]]]]},
    "inpainting_big": {"mask": [[[[0]]]]},
    "semantic_synthesis": {"segmentation": [[0]]},
    "layout2img": {"tokens": [0]},
}
"""A field that only this model takes."""


@pytest.fixture(scope="module", params=BUILT)
def paper(request: pytest.FixtureRequest, shared: SharedFolders) -> PaperBundle:
    return paper_bundle(shared, request.param)


def test_graphs_give_the_image_of_the_equations(paper: PaperBundle) -> None:
    with LatentDiffusionPipeline.from_bundle(paper.bundle, backend="onnxruntime") as pipeline:
        assert_equal(pipeline, paper.row)


def test_verification_of_the_default_requests(paper: PaperBundle) -> None:
    result = verify(paper.bundle, paper.checkpoint(), steps=2)
    assert result.failures == [] and len(result.images) == 4
    assert all(image.label != "without conditioning" for image in result.images)


def test_the_batch_scheduler_gives_the_pipelines_images(paper: PaperBundle) -> None:
    options = {**paper.row.options, "num_inference_steps": STEPS, "eta": 0.5}
    with LatentDiffusionPipeline.from_bundle(paper.bundle, backend="onnxruntime") as pipeline:
        alone = to_uint8(pipeline(seed=3, **options).arrays).astype(int)
        with BatchScheduler(pipeline) as scheduler:
            jobs = [scheduler.submit(Request(seed=3, **options)) for _ in range(2)]
            for job in jobs:
                assert abs(job.result(60).images.astype(int) - alone).max() <= 1


def test_arguments_of_other_tasks_are_refused(paper: PaperBundle) -> None:
    with LatentDiffusionPipeline.from_bundle(paper.bundle, backend="onnxruntime") as pipeline:
        for name, fields in FIELDS.items():
            if name != paper.row.name and not set(fields) & {f for c in pipeline.conditioners for f in c.fields}:
                with pytest.raises(SpecError, match=r"got a value, but this \w+ model takes .* instead"):
                    pipeline(**{**paper.row.options, **fields})
        with pytest.raises(SpecError, match="prompts: got a value, but this"):
            pipeline("a red circle", **paper.row.options)


@pytest.mark.parametrize("name", ["bsr_sr", "inpainting_big", "semantic_synthesis"])
def test_other_sizes_give_what_the_modules_give(name: str, shared: SharedFolders, tmp_path: Path) -> None:
    paper = paper_bundle(shared, name)
    rng = np.random.default_rng(0)
    scale = 1 if name == "bsr_sr" else 4
    picture = rng.random((1, 3, 12 * scale, 22 * scale), np.float32)
    mask = np.zeros((1, 1, 12 * scale, 22 * scale), np.float32)
    mask[..., : 9 * scale] = 1
    fields: dict[str, Any] = {
        "bsr_sr": {"image": picture},
        "inpainting_big": {"image": picture, "mask": mask},
        "semantic_synthesis": {"segmentation": (picture[:, 0] * 7).astype(np.int64)},
    }[name]
    options = {**fields, "seed": 1, "num_inference_steps": 4, "eta": 0.0}
    with (
        LatentDiffusionPipeline.from_bundle(paper.bundle, backend="onnxruntime") as ours,
        torch_pipeline(paper.checkpoint(), tmp_path / "files") as theirs,
    ):
        found, expected = ours(**options), theirs(**options)
        assert found.arrays.shape == (1, 3, 48, 88)
        assert np.abs(found.latents - expected.latents).max() < 2e-5 * np.abs(expected.latents).max()
        with pytest.raises(SpecError, match="height: got 64, but the request's image leads to 48"):
            ours(**options, height=64)


def test_the_command_line(paper: PaperBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inputs are read from files; the image is that of the same request in Python."""
    options, fields = files_of(paper.row, tmp_path)
    common = ["--seed", "5", "--steps", "2", "--backend", "onnxruntime", "-o", str(tmp_path / "out.png")]
    assert main(["generate", str(paper.folder / "bundle"), *options, *common]) == 0
    with LatentDiffusionPipeline.from_bundle(paper.bundle, backend="onnxruntime") as pipeline:
        (image,) = pipeline(seed=5, num_inference_steps=2, **fields).images
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png"), int) - np.asarray(image, int)).max() <= 1
    assert "resized" not in capsys.readouterr().err
