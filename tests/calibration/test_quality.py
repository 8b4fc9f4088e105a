"""PSNR and SSIM of two images, and the comparison of trial images with a grader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from ldm_calibration.quality import EQUAL_PSNR, Image, image_psnr, mean_psnr, ssim
from ldm_calibration.trials import compare_images


def pair() -> tuple[Image, Image]:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    return one, np.clip(one.astype(int) + rng.integers(-9, 10, one.shape), 0, 255).astype(np.uint8)


def test_ssim_and_psnr() -> None:
    one, other = pair()
    assert image_psnr(one, one) is None and ssim(one, one) == pytest.approx(1)
    assert image_psnr(one, other) == pytest.approx(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))
    assert ssim(one, np.full_like(one, 127)) < 0.1 < 0.9 < ssim(one, other) < 1


def test_equal_images_count_in_a_mean() -> None:
    assert mean_psnr([None, 40.0]) == (EQUAL_PSNR + 40) / 2


def test_a_grader_gets_the_requests_and_its_marks_give_the_loss() -> None:
    one, other = pair()
    requests = ({"prompts": "red"}, {"prompts": "blue"})

    def grade(images: Sequence[Image], graded_requests: Sequence[Mapping[str, Any]]) -> list[bool]:
        assert graded_requests == requests
        return [bool((image == one).all()) for image in images]

    result = compare_images([one, one], [one, other], requests, grade)
    assert (result.correct_fp32, result.correct_int8, result.accuracy_loss) == ((True, True), (True, False), 0.5)
    assert result.to_json(requests)[1]["correct_int8"] is False and result.to_json(requests)[1]["seed"] == 1001
    for blind in (None, lambda images, graded_requests: None):
        ungraded = compare_images([one, one], [one, other], requests, blind)
        assert ungraded.accuracy_loss is None and ungraded.to_json(requests)[0]["correct_fp32"] is None
