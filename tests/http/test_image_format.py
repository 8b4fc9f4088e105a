"""Images of answers: the pixels survive, whatever the compression."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.http.image_format import ImageFormat
from ldm_runtime.images import pil_image, to_png


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_answers_keep_every_pixel_at_the_fast_compression(channels: int) -> None:
    ramp = np.add.outer(np.arange(64), np.arange(64)) // 16
    image = np.repeat(ramp[:, :, None], channels, 2).astype(np.uint8)
    answer = ImageFormat().encode(image)
    read = np.asarray(Image.open(io.BytesIO(answer)))
    assert (read.reshape(image.shape) == image).all()
    assert answer != to_png(pil_image(image)), "the level of files, which takes twice as long"
