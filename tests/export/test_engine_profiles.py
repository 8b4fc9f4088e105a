"""Bounds of a request, and the optimization profiles made of them."""

from __future__ import annotations

import pytest

from ldm_export.engine.profiles import bounded, latent_bounds, parse_bounds, profiles
from ldm_export.engine.request import Bounds, EngineRequest
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

ROWS, IMAGES = Axis("batch", 1, 2, 64), Axis("batch", 1, 1, 32)
SIDE = {name: Axis(name, 2, 32, 128) for name in ("height", "width")}
SAMPLE = TensorSpec("sample", "float32", (ROWS, 4, SIDE["height"], SIDE["width"]))
LATENTS = TensorSpec("latents", "float32", (IMAGES, 4, SIDE["height"], SIDE["width"]))
TEXT = TensorSpec("input_ids", "int64", (IMAGES, 77))
CONTEXT = TensorSpec("context", "float32", (ROWS, 77, 24))
TIMESTEP = TensorSpec("timestep", "int64", (ROWS,))
PAIRS = Axis("images", 1, 1, 32)
DOUBLED = TensorSpec("sample", "float32", (PAIRS * 2, 4, SIDE["height"], SIDE["width"]))
SPECS = {
    "text_encoder": ComponentSpec("text_encoder", (TEXT,), (CONTEXT,), "request"),
    "cross_attention_kv": ComponentSpec("cross_attention_kv", (CONTEXT,), (), "request"),
    "time_embedding": ComponentSpec("time_embedding", (TIMESTEP,), (), "schedule"),
    "unet": ComponentSpec("unet", (SAMPLE, CONTEXT), (), "step"),
    "guided_step": ComponentSpec("guided_step", (DOUBLED,), (), "step"),
    "decoder": ComponentSpec("decoder", (LATENTS,), (), "image"),
}


def request(rows_per_image: int = 2, **bounds: Bounds) -> EngineRequest:
    return EngineRequest("tensorrt-rtx", ("8.9",), tuple(bounds.items()), rows_per_image)


@pytest.mark.parametrize(("text", "bounds"), [("1:2:8", (1, 2, 8)), ("4", (4, 4, 4)), ("256:256:512", (256, 256, 512))])
def test_bounds_read(text: str, bounds: Bounds) -> None:
    assert parse_bounds("batch", text) == bounds


@pytest.mark.parametrize("text", ["", "0", "2:1:3", "1:3:2", "1:2", "1:2:3:4", "a", "-1", "1.5", "9999999", "1:1:8 "])
def test_bounds_refused(text: str) -> None:
    with pytest.raises(BuildError, match=r"^height: got .*, expected min:opt:max"):
        parse_bounds("height", text)


def test_pixels_become_latents_once() -> None:
    assert latent_bounds("height", (256, 256, 512), 8) == (32, 32, 64)
    with pytest.raises(BuildError, match=r"^height: got 256:260:512 pixels, expected multiples of 8"):
        latent_bounds("height", (256, 260, 512), 8)


def test_default_profiles_are_a_static_one_and_up_to_eight_images_of_the_models_size() -> None:
    static, wide = profiles(bounded(SPECS["unet"], request()))
    assert static["sample"] == ((2, 4, 32, 32),) * 3
    assert wide["sample"] == ((1, 4, 32, 32), (2, 4, 32, 32), (16, 4, 32, 32))
    assert wide["context"] == ((1, 77, 24), (2, 77, 24), (16, 77, 24))
    assert profiles(bounded(SPECS["decoder"], request()))[1]["latents"][2] == (8, 4, 32, 32)


def test_the_unet_takes_a_row_for_each_image_and_branch() -> None:
    bounds = {"batch": (1, 2, 4), "height": (32, 32, 64), "width": (16, 32, 32)}
    *_, wide = profiles(bounded(SPECS["unet"], request(**bounds)))
    assert wide["sample"] == ((1, 4, 32, 16), (4, 4, 32, 32), (8, 4, 64, 32))
    *_, wide = profiles(bounded(SPECS["unet"], request(1, **bounds)))
    assert wide["sample"] == ((1, 4, 32, 16), (2, 4, 32, 32), (4, 4, 64, 32))
    *_, wide = profiles(bounded(SPECS["decoder"], request(**bounds)))
    assert wide["latents"] == ((1, 4, 32, 16), (2, 4, 32, 32), (4, 4, 64, 32))
    *_, wide = profiles(bounded(SPECS["guided_step"], request(**bounds)))
    assert wide["sample"] == ((2, 4, 32, 16), (4, 4, 32, 32), (8, 4, 64, 32))


def test_components_of_a_request_take_one_text_or_all_rows_of_the_unet() -> None:
    static, wide = profiles(bounded(SPECS["cross_attention_kv"], request(batch=(1, 1, 4))))
    assert static["context"] == ((1, 77, 24),) * 3 and wide["context"][2] == (8, 77, 24)
    *_, wide = profiles(bounded(SPECS["text_encoder"], request(batch=(1, 1, 32))))
    assert wide["input_ids"] == ((1, 77), (1, 77), (32, 77))  # its graph takes no more


def test_components_of_a_schedule_keep_the_range_of_their_graph() -> None:
    static, wide = profiles(bounded(SPECS["time_embedding"], request(batch=(1, 1, 1))))
    assert static["timestep"] == ((2,),) * 3 and wide["timestep"] == ((1,), (2,), (64,))


def test_one_profile_where_nothing_varies() -> None:
    assert len(profiles(bounded(SPECS["decoder"], request(batch=(1, 1, 1))))) == 1
    assert len(profiles(bounded(SPECS["unet"], request(batch=(1, 1, 1))))) == 2  # with guidance and without


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"batch": (1, 1, 999)}, r"^unet: batch 1:2:1998 is beyond 1..64 of its graph"),
        ({"width": (1, 32, 32)}, r"^unet: width 1:32:32 is beyond 2..128 of its graph"),
    ],
)
def test_bounds_the_graph_does_not_take(bounds: dict[str, Bounds], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        bounded(SPECS["unet"], request(**bounds))
