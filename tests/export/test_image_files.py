"""Image files: the format is the suffix's, other suffixes are refused, and the user learns what was overwritten."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_export.cli import main
from ldm_export.verbs.image_options import ImageFiles, check_output, write_images
from ldm_runtime.errors import BuildError, SpecError
from ldm_runtime.images import FORMATS, to_bytes

COLOURS = {"L": 90, "RGB": (200, 60, 20), "RGBA": (200, 60, 20, 128)}


def image(mode: str) -> Image.Image:
    return Image.new(mode, (16, 8), COLOURS[mode])


@pytest.mark.parametrize("mode", COLOURS)
@pytest.mark.parametrize("suffix", [*FORMATS, ".JPG"])
def test_format_of_the_suffix(suffix: str, mode: str) -> None:
    with Image.open(io.BytesIO(to_bytes(image(mode), suffix))) as read:
        assert read.format == FORMATS[suffix.lower()]
        on_white = Image.alpha_composite(Image.new("RGBA", (16, 8), "white"), image(mode).convert("RGBA"))
        on_background = Image.alpha_composite(Image.new("RGBA", (16, 8), "white"), read.convert("RGBA"))
        assert np.abs(np.asarray(on_background, int) - np.asarray(on_white, int)).max() <= 4


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(SpecError, match=r"image: got the suffix '.mp4', expected one of .png, .jpg"):
        to_bytes(image("RGB"), ".mp4")
    with pytest.raises(SpecError, match=r"image: WEBP does not take RGB \(20000, 1\)"):
        to_bytes(Image.new("RGB", (20_000, 1)), ".webp")


def test_a_grid_and_its_images(tmp_path: Path) -> None:
    output = tmp_path / "out.webp"
    image_files = write_images(output, [image("RGB")] * 2, None, each=True)
    files = (output, tmp_path / "out-0.webp", tmp_path / "out-1.webp")
    assert image_files == ImageFiles(files, ())
    for file in files:
        with Image.open(file) as read:
            assert read.format == "WEBP"
    files[1].unlink()
    assert write_images(output, [image("RGB")] * 2, None, each=True).replaced == (files[0], files[2])


@pytest.mark.parametrize("name", ["out", "out.mp4", "out.png.txt", ".png"])
def test_suffixes_that_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BuildError, match=r"expected a name that ends in \.png, \.jpg, .*; choose another -o$"):
        check_output(tmp_path / name)


def test_generate_tells_what_it_overwrote_and_what_it_left_out(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jpg"
    command = [
        "generate",
        str(tiny_bundle),
        "red " * 100,
        "--steps",
        "1",
        "--backend",
        "onnxruntime",
        "-o",
        str(output),
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert output.read_bytes().startswith(b"\xff\xd8\xff") and out == f"{output}\n"
    assert "warning: prompt: only 299 of its 400 characters are used, because the model takes 77 tokens" in err
    assert "overwrote" not in err
    assert main(command) == 0
    assert f"overwrote {output}\n" in capsys.readouterr().err
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overwritten"] == [str(output)]
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
