"""The request with which the batch scheduler tests that a pipeline generates images."""

from __future__ import annotations

from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request

__all__ = ["self_test_request"]

STEPS = (1, 4)
"""Numbers of steps to try; PNDM with Runge-Kutta steps needs at least four."""


def self_test_request(pipeline: LatentDiffusionPipeline) -> Request:
    """Return the cheapest valid request: one image, unguided, in as few steps as the scheduler allows.

    Raises:
        SpecError: The model accepts no such request.
    """
    example: dict[str, Any] = {}
    for conditioner in pipeline.conditioners:
        example |= conditioner.example()
    for steps in STEPS:
        request = Request(**example, seed=0, eta=0.0, guidance_scale=1.0, num_inference_steps=steps)
        try:
            pipeline.plan(request)
        except SpecError:
            if steps == STEPS[-1]:
                raise
        else:
            break
    return request
