"""Class-conditional, super-resolution, inpainting, semantic and layout models: bundles, verification and scheduling."""

from __future__ import annotations

import pytest

from ldm_export.quality.verification import verify
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import SpecError
from ldm_runtime.images import to_uint8
from tests.support.paper_bundles import BUILT, PaperBundle, paper_bundle
from tests.support.paper_models import STEPS, assert_equal
from tests.support.shared import SharedFolders

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
