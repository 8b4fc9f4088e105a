"""Inputs of the super-resolution and the inpainting model, their grading, and the commands that write and show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_calibration.inputs import read_inputs
from ldm_export_demo import row, samples
from ldm_export_demo.drawing import Figure, Scene, coverage, draw
from ldm_export_demo.inputs import (
    MASKS,
    MaskedImage,
    figure_mask,
    low_resolution,
    masked_trials,
    rectangle_mask,
    trial_images,
)
from ldm_export_demo.restoration import filled, grade_inpainting, psnr, shows_the_same

FIGURE = Figure("red", "circle", 10.0, 32.0, 30.0)


def test_a_small_image_has_the_mean_of_each_block() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[4:8, 8:12] = 100
    image[0, 0] = 160
    small = low_resolution(image)
    assert small.shape == (16, 16, 3) and small.dtype == np.uint8
    assert (small[1, 2] == 100).all() and (small[0, 0] == 10).all() and small.sum() == 330


def test_masks_hide_a_whole_object_or_a_part_of_it() -> None:
    rng, drawn = np.random.default_rng(0), coverage(FIGURE.shape, FIGURE.radius, FIGURE.x, FIGURE.y) > 0
    for _ in range(50):
        whole, part, anywhere = (
            figure_mask(FIGURE, "object", rng),
            figure_mask(FIGURE, "part", rng),
            rectangle_mask(rng),
        )
        assert set(np.unique([whole, part, anywhere])) == {0, 255}
        assert (whole[drawn] == 255).all()
        assert 0.1 < (part[drawn] == 255).mean() < 0.9
        assert all((mask == np.kron(mask[::4, ::4], np.ones((4, 4)))).all() for mask in (whole, part, anywhere))
    with pytest.raises(ValueError, match="mask: got 'half', expected part or object"):
        figure_mask(FIGURE, "half", rng)


def test_trials_are_reproducible_and_alternate_masks() -> None:
    first, again = masked_trials(6), masked_trials(6)
    assert [one.kind for one in first] == list(MASKS) * 3
    assert all((a.image == b.image).all() and (a.mask == b.mask).all() for a, b in zip(first, again, strict=True))
    assert len(trial_images(6)) == 6 and (trial_images(6)[0] == trial_images(6)[0]).all()


def test_the_original_is_correct_and_a_plain_fill_is_not() -> None:
    trials = masked_trials(12)
    assert sum(grade_inpainting(filled(trial), trial).correct for trial in trials) <= 2
    for trial in trials:
        assert grade_inpainting(trial.image, trial).correct
        changed = trial.image.copy()
        changed[tuple(np.argwhere(trial.mask == 0)[0])] += 1
        assert not grade_inpainting(changed, trial).unchanged


def test_a_part_stays_of_its_object_and_everything_keeps_its_background() -> None:
    def drawn(ground: str = "white", **changes: object) -> np.ndarray:
        return draw(Scene(ground, (replace(FIGURE, radius=12.0, **changes),)))

    red, blue, yellow = drawn(), drawn(colour="blue"), drawn("yellow")
    everywhere = np.full((64, 64), 255, np.uint8)
    part, whole = (MaskedImage(red, everywhere, kind) for kind in ("part", "object"))
    for other in (blue, drawn(shape="square"), drawn(x=28.0)):
        assert not grade_inpainting(other, part).redrawn
        assert grade_inpainting(other, whole).correct
    assert not grade_inpainting(yellow, whole).continued and grade_inpainting(yellow, whole).redrawn


def test_enlargement_is_compared_with_the_original() -> None:
    for image in trial_images(4):
        smooth = Image.fromarray(low_resolution(image)).resize((64, 64), Image.Resampling.BICUBIC)
        assert shows_the_same(image, image) and not shows_the_same(np.asarray(smooth), image)
        assert 20 < psnr(np.asarray(smooth), image) < 40 and psnr(image, image) == float("inf")
    first, second, *_ = trial_images(4)
    assert not shows_the_same(first, second)


def test_samples_are_inputs_of_the_product_and_fill_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples.main([str(tmp_path), "--count", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert len(read_inputs(tmp_path / "super-resolution", "image")) == 3
    assert [sorted(one) for one in read_inputs(tmp_path / "inpainting", "masked_image")] == [["image", "mask"]] * 3
    for name in ("super-resolution", "inpainting"):
        result = tmp_path / name / "0.png"
        row.main([str(tmp_path / name), str(result), str(result), "-o", str(tmp_path / "row.png")])
        with Image.open(tmp_path / "row.png") as image:
            assert image.size == (802, 130)


def test_what_the_commands_cannot_do_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="1"):
        samples.main([str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        samples.main([str(tmp_path), "--count", "0"])
    with pytest.raises(SystemExit, match="1"):
        row.main([str(tmp_path), str(tmp_path / "missing.png"), "-o", str(tmp_path / "row.png")])
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "row.png").exists()
