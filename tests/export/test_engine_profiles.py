"""Bounds a user gives, and the optimization profiles made of them."""

from __future__ import annotations

import pytest
from ldm_export.families.text_to_image import ModelShape

from ldm_export.engine.profiles import bounded, parse_bounds, profiles
from ldm_runtime.errors import BuildError

SPECS = ModelShape(tokens=77, context_width=24, latents=Latents(4, 8), latent_size=32, image_channels=3).specs()


@pytest.mark.parametrize(("text", "bounds"), [("1:2:8", (1, 2, 8)), ("4", (4, 4, 4)), ("256:256:512", (256, 256, 512))])
def test_bounds_read(text: str, bounds: tuple[int, int, int]) -> None:
    assert parse_bounds("batch", text) == bounds


@pytest.mark.parametrize("text", ["", "0", "2:1:3", "1:3:2", "1:2", "1:2:3:4", "a", "-1", "1.5", "9999999", "1:1:8 "])
def test_bounds_refused(text: str) -> None:
    with pytest.raises(BuildError, match=r"^height: got .*, expected min:opt:max"):
        parse_bounds("height", text)


def test_default_profiles_are_a_static_one_and_up_to_eight_images_of_the_models_size() -> None:
    static, wide = profiles(bounded(SPECS["unet"], {}, 8))
    assert static["sample"] == ((2, 4, 32, 32),) * 3
    assert wide["sample"] == ((1, 4, 32, 32), (2, 4, 32, 32), (16, 4, 32, 32))
    assert wide["timestep"] == ((1,), (2,), (16,))
    assert wide["context"] == ((1, 77, 24), (2, 77, 24), (16, 77, 24))
    assert profiles(bounded(SPECS["decoder"], {}, 8))[1]["latents"][2] == (8, 4, 32, 32)


def test_pixels_become_latents_and_images_rows() -> None:
    bounds = {"batch": (1, 2, 4), "height": (256, 256, 512), "width": (128, 256, 256)}
    *_, wide = profiles(bounded(SPECS["unet"], bounds, 8))
    assert wide["sample"] == ((1, 4, 32, 16), (4, 4, 32, 32), (8, 4, 64, 32))
    *_, wide = profiles(bounded(SPECS["decoder"], bounds, 8))
    assert wide["latents"] == ((1, 4, 32, 16), (2, 4, 32, 32), (4, 4, 64, 32))


def test_one_profile_where_nothing_varies() -> None:
    bounds = {"batch": (1, 1, 1)}
    assert len(profiles(bounded(SPECS["text_encoder"], bounds, 8))) == 1
    assert len(profiles(bounded(SPECS["unet"], bounds, 8))) == 2  # with guidance and without


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"height": (256, 260, 512)}, r"^height: got 256:260:512 pixels, expected multiples of 8"),
        ({"batch": (1, 1, 999)}, r"^unet: batch 1:2:1998 is beyond 1..64 of its graph"),
        ({"width": (8, 256, 256)}, r"^unet: width 1:32:32 is beyond 2..128 of its graph"),
    ],
)
def test_bounds_the_graph_does_not_take(bounds: dict[str, tuple[int, int, int]], said: str) -> None:
    with pytest.raises(BuildError, match=said):
        bounded(SPECS["unet"], bounds, 8)
