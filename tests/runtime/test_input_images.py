"""Image files that callers give: read within limits, upright, and in RGB whatever their mode."""

from __future__ import annotations

import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.conditioning.image import image_array
from ldm_runtime.errors import SpecError
from ldm_runtime.input_images import open_image, rgb_image
from tests.support.png_header import png_header

RED = (200, 10, 20)


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000)], ids=["100 megapixels", "900 megapixels"])
def test_large_images_are_refused_before_they_are_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(SpecError, match=r"a.png: got .*pixels.*, expected at most 33554432"):
        open_image(tmp_path / "a.png")


def test_animated_images_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(SpecError, match=r"a.gif: got 3 frames, expected a single image"):
        open_image(tmp_path / "a.gif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_truncated_images_are_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SpecError, match=r"cannot be read as an image \(.+\); give a PNG or JPEG") as error:
        open_image(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"no image", bytes(4000)])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(SpecError, match=r"a.png: cannot be read as an image"):
        open_image(tmp_path / "a.png")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(SpecError, match=r"cannot be read as an image \((No such file|Is a directory)"):
            open_image(path)


def test_the_orientation_of_a_photo_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == (4, 8) and upright.getpixel((3, 0)) == (255, 255, 255)


def test_modes_become_rgb() -> None:
    grey = np.array([[0, 257 * 100, 65535]], np.uint16)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, *RED])
    transparent = Image.new("P", (1, 1), 0)
    transparent.putpalette([0, 0, 0])
    transparent.info["transparency"] = 0
    cases = {
        "16 bits": (Image.fromarray(grey), [[0, 0, 0], [100] * 3, [255] * 3]),
        "32 bits": (Image.fromarray(grey.astype(np.int32)), [[0, 0, 0], [100] * 3, [255] * 3]),
        "palette": (palette, [list(RED)]),
        "transparent palette": (transparent, [[255] * 3]),
        "transparent": (Image.new("RGBA", (1, 1), (*RED, 0)), [[255] * 3]),
        "opaque": (Image.new("RGBA", (1, 1), (*RED, 255)), [list(RED)]),
        "grey with alpha": (Image.new("LA", (1, 1), (0, 0)), [[255] * 3]),
        "bits": (Image.new("1", (1, 1), 1), [[255] * 3]),
        "print colours": (Image.new("CMYK", (1, 1), (0, 0, 0, 0)), [[255] * 3]),
    }
    for name, (image, expected) in cases.items():
        assert np.asarray(rgb_image(image))[0].tolist() == expected, name
        array = image_array("image", image)
        assert np.rint(array[0, :, 0].T * 255).tolist() == expected, name


def test_warning_filters_of_other_threads_stay() -> None:
    """Filters belong to the process: threads that exchange them at the same time would not restore them."""
    reading, compared = threading.Event(), threading.Event()

    class Stopped(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            reading.set()
            assert compared.wait(60)
            return super().read(size)

    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    before = list(warnings.filters)
    with ThreadPoolExecutor() as pool:
        opened = pool.submit(open_image, Stopped(file.getvalue()), "a")
        assert reading.wait(60)
        during = list(warnings.filters)
        compared.set()
        assert opened.result().size == (2, 2)
    assert during == before
