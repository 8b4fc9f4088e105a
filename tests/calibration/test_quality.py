"""How close two images are."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_calibration.quality import psnr, ssim


def test_ssim_and_psnr() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    other = np.clip(one.astype(int) + rng.integers(-9, 10, one.shape), 0, 255).astype(np.uint8)
    assert psnr(one, one) is None and ssim(one, one) == pytest.approx(1)
    assert psnr(one, other) == pytest.approx(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))
    assert ssim(one, np.full_like(one, 127)) < 0.1 < 0.9 < ssim(one, other) < 1
