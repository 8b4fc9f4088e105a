"""Arrays to images: rounded as diffusers rounds, laid out in rows, written as PNG files that read back equal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from diffusers.utils.pil_utils import numpy_to_pil
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from ldm_runtime.errors import SpecError
from ldm_runtime.images import grid, to_pil, to_png, to_uint8

HALVES = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
shapes = array_shapes(min_dims=3, max_dims=3, max_side=5).map(lambda shape: (shape[0], 3, *shape[1:]))
floats = st.floats(0, 1, width=32) | st.sampled_from([float(half) for half in HALVES])


def theirs(images: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(image) for image in numpy_to_pil(images.transpose(0, 2, 3, 1))])


@settings(max_examples=200)
@given(arrays(np.float32, shapes, elements=floats))
def test_rounding_is_diffusers_rounding(images: np.ndarray) -> None:
    assert np.array_equal(to_uint8(images), theirs(images))


def test_every_exact_half_and_its_neighbours_round_as_in_diffusers() -> None:
    near = [HALVES, np.nextafter(HALVES, np.float32(0)), np.nextafter(HALVES, np.float32(1))]
    images = np.stack(near).reshape(1, 3, 15, 17)
    exact = np.count_nonzero(HALVES * np.float32(255) % 1 == 0.5)
    assert exact > 200  # so that half to even is what decides
    assert np.array_equal(to_uint8(images), theirs(images))
    assert len(np.unique(to_uint8(images[:, :1]) % 2)) == (1 if exact == len(HALVES) else 2)


def test_what_lies_outside_is_clipped() -> None:
    images = np.array([-1, -0.0, 0, 1, 1.5, 3e38], np.float32).reshape(1, 3, 1, 2)
    assert to_uint8(images).transpose(0, 3, 1, 2).ravel().tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(value: float) -> None:
    images = np.full((2, 3, 4, 4), 0.5, np.float32)
    images[1, 2, 3, 0] = value
    with pytest.raises(SpecError, match="image: the decoder gave NaN or infinite values"):
        to_uint8(images)


def test_channels_rows_and_columns_stay_in_place() -> None:
    images = np.zeros((2, 3, 4, 6), np.float32)
    images[1, 0, 2, 5] = 1
    first, second = to_pil(images)
    assert (first.size, first.mode, first.getbbox()) == ((6, 4), "RGB", None)
    assert second.getbbox() == (5, 2, 6, 3) and second.getpixel((5, 2)) == (255, 0, 0)


def tiles(count: int, width: int = 4, height: int = 3) -> list[Image.Image]:
    """Images of one colour each, none of them white."""
    return [Image.new("RGB", (width, height), (index + 1, 2 * index, 7)) for index in range(count)]


@pytest.mark.parametrize(
    ("count", "columns", "across", "down"),
    [
        *((1, None, 1, 1), (2, None, 2, 1), (3, None, 2, 2), (4, None, 2, 2), (5, None, 3, 2), (9, None, 3, 3)),
        *((10, None, 4, 3), (6, 1, 1, 6), (6, 4, 4, 2), (6, 6, 6, 1), (2, 9, 2, 1)),
    ],
)
def test_the_grid_has_these_rows_and_columns(count: int, columns: int | None, across: int, down: int) -> None:
    assert grid(tiles(count), columns, gap=0).size == (across * 4, down * 3)
    assert grid(tiles(count), columns).size == (across * 6 - 2, down * 5 - 2)


@given(st.integers(1, 12), st.none() | st.integers(1, 14), st.integers(0, 4), st.integers(1, 5), st.integers(1, 5))
def test_every_image_is_in_its_place_and_the_rest_is_white(count, columns, gap, width, height) -> None:
    images = tiles(count, width, height)
    sheet = np.array(grid(images, columns, gap))
    across = (sheet.shape[1] + gap) // (width + gap)
    for index, image in enumerate(images):
        row, column = divmod(index, across)
        top, left = row * (height + gap), column * (width + gap)
        place = sheet[top : top + height, left : left + width]
        assert np.array_equal(place, np.asarray(image))
        place[:] = 255
    assert (sheet == 255).all()


def test_no_images_and_no_columns_are_refused() -> None:
    with pytest.raises(SpecError, match="grid: got no images, expected at least one"):
        grid([])
    for columns in (0, -1):
        with pytest.raises(SpecError, match=f"grid: columns: got {columns}, expected a whole number from 1"):
            grid(tiles(2), columns)


def test_the_grid_is_a_new_image() -> None:
    (image,) = tiles(1)
    grid([image]).putpixel((0, 0), (9, 9, 9))
    assert image.getpixel((0, 0)) == (1, 0, 7)


def test_a_png_reads_back_equal_and_equal_images_give_equal_bytes() -> None:
    image = to_pil(np.random.default_rng(0).random((1, 3, 8, 16), np.float32))[0]
    content = to_png(image)
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content == to_png(image.copy())
    read = Image.open(io.BytesIO(content))
    assert read.format == "PNG" and np.array_equal(np.asarray(read), np.asarray(image))
