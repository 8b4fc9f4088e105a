"""Conditioners of labels, images, masks, segmentations and layouts: what they encode, and what they refuse."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.conditioning import (
    ImageConditioner,
    LabelConditioner,
    LayoutConditioner,
    MaskedImageConditioner,
    SegmentationConditioner,
)
from ldm_runtime.conditioning.layout_tokens import LayoutVocabulary
from ldm_runtime.conditioning.strength import STRENGTHS, default_strengths, strength_settings
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec, Latents, ModelDescription
from ldm_runtime.request import Request
from ldm_runtime.required_memory import report_memory, required_bytes
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec

BATCH, HEIGHT, WIDTH = Axis("batch", 1, 1, 32), Axis("height", 2, 8, 16), Axis("width", 2, 8, 16)
LAYOUTS = LayoutVocabulary(92, 8192, [f"class {number}" for number in range(500)])
TOP, BOTTOM = 0, 89 * 90 + 89


class Recorded(SpecBackend):
    """Returns its first input as float32, and keeps its feeds."""

    def __init__(self, *inputs: TensorSpec, output: str = "given"):
        self._spec = ComponentSpec("encoder", inputs, (TensorSpec(output, "float32", inputs[0].shape),), "request")
        self.feeds: list[Feed] = []

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        self.feeds.append(feed)
        return {self._spec.outputs[0].name: np.asarray(next(iter(feed.values())), np.float32)}

    def close(self) -> None:
        """Nothing to free."""


def pixels(channels: int, *sides: Dim) -> tuple[Dim, ...]:
    return (BATCH, channels, *sides)


def images() -> ImageConditioner:
    return ImageConditioner(TensorSpec("low", "float32", pixels(3, HEIGHT, WIDTH)))


def masked() -> MaskedImageConditioner:
    sides = (HEIGHT * 4, WIDTH * 4)
    image, mask = (
        TensorSpec(name, "float32", pixels(channels, *sides)) for name, channels in (("image", 3), ("mask", 1))
    )
    return MaskedImageConditioner(Recorded(image, mask), "given")


def segmentations() -> SegmentationConditioner:
    backend = Recorded(TensorSpec("segmentation", "int64", (BATCH, HEIGHT * 4, WIDTH * 4)))
    return SegmentationConditioner(backend, "given", 7)


def layouts(categories: int = 500) -> LayoutConditioner:
    vocabulary = LAYOUTS if categories else LayoutVocabulary(92, 8192)
    return LayoutConditioner(Recorded(TensorSpec("tokens", "int64", (BATCH, 92))), "given", vocabulary)


def labels() -> LabelConditioner:
    return LabelConditioner(Recorded(TensorSpec("label", "int64", (BATCH,))), "given", 10, 10)


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def half_mask(height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    mask = np.zeros((height, width, 1), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def test_labels_are_repeated_for_each_image_and_replaced_in_the_unconditional_branch() -> None:
    request = Request(labels=[3, 1, 3], images_per_prompt=2)
    assert labels().images(request) == 6
    assert labels().rows(request, "conditional")["given"].tolist() == [3, 3, 1, 1, 3, 3]
    assert labels().rows(request, "unconditional")["given"].tolist() == [10] * 6


def test_images_are_scaled_to_one_around_zero() -> None:
    array = noise(2, 12, 10, 3)
    request = Request(image=array)
    assert images().images(request) == 2 and images().size(request) == (12, 10)
    expected = array.transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(images().rows(request, "conditional")["low"], expected, atol=1e-6)


def test_a_mask_is_encoded_and_decides_what_is_kept() -> None:
    array, conditioner = noise(32, 48, 3), masked()
    request = Request(image=array, mask=half_mask(32, 48))
    assert conditioner.images(request) == 1 and conditioner.size(request) == (8, 12)
    conditioner.rows(request, "conditional")
    feed = conditioner._backend.feeds[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(feed["image"][0], array.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert feed["mask"][0, 0, :, :24].all() and not feed["mask"][0, 0, :, 24:].any()
    result = conditioner.finish(request, np.full((1, 3, 32, 48), 0.5, np.float32))
    assert (result[..., :24] == 0.5).all()
    np.testing.assert_allclose(result[0, :, :, 24:], array.transpose(2, 0, 1)[..., 24:] / 255, atol=1e-6)


def test_each_input_gives_several_images() -> None:
    pictures, mask = noise(2, 32, 32, 3), half_mask()
    classes = np.arange(2 * 32 * 32).reshape(2, 32, 32) % 7
    cases: list[tuple[Any, Request]] = [
        (images(), Request(image=pictures[:, :16, :16], images_per_prompt=3)),
        (masked(), Request(image=pictures, mask=mask, images_per_prompt=3)),
        (segmentations(), Request(segmentation=classes, images_per_prompt=3)),
    ]
    for conditioner, request in cases:
        assert conditioner.images(request) == 6 and "images_per_prompt" in conditioner.fields
        (rows,) = conditioner.rows(request, "conditional").values()
        (once,) = conditioner.rows(replace(request, images_per_prompt=1), "conditional").values()
        assert not np.array_equal(once[0], once[1])
        assert np.array_equal(rows, once[[0, 0, 0, 1, 1, 1]])
    grey = np.full((6, 3, 32, 32), 0.5, np.float32)
    finished = masked().finish(cases[1][1], grey)
    assert (finished[..., :16] == 0.5).all()
    np.testing.assert_allclose(finished[3, ..., 16:], pictures[1].transpose(2, 0, 1)[..., 16:] / 255, atol=1e-6)


def test_palette_indices_are_classes() -> None:
    classes = (np.arange(32 * 32).reshape(32, 32) % 7).astype(np.uint8)
    image = Image.fromarray(classes)
    palette = Image.new("P", image.size)
    palette.putdata(classes.ravel().tolist())
    palette.putpalette([200, 10, 20] * 7)
    for given in (image, palette, classes, classes[None].astype(np.int32)):
        found = segmentations().rows(Request(segmentation=given), "conditional")["given"]
        assert np.array_equal(found[0], classes)


def test_layouts_become_the_tokens_of_taming_transformers() -> None:
    tokens = LAYOUTS.encode([("class 7", (0.25, 0.5, 0.5, 0.25)), (3, (0, 0, 1, 1), ("group", "inside"))])
    corners = (round(0.5 * 89) * 90 + round(0.25 * 89), round(0.75 * 89) * 90 + round(0.75 * 89))
    assert tokens[:6] == [7, *corners, 3 + 500 * 9, TOP, BOTTOM]
    assert tokens[6:90] == [8191] * 84 and tokens[90:] == [TOP, BOTTOM] and len(tokens) == 92


def test_one_layout_or_several_and_their_tokens() -> None:
    one = [("class 1", (0, 0, 0.5, 0.5))]
    for given, count in ((one, 1), ([one, [], one], 3), ([[["class 1", [0, 0, 0.5, 0.5]]]], 1), ([], 1)):
        assert layouts().images(Request(layout=given)) == count
    rows = layouts().rows(Request(layout=[one, []], images_per_prompt=2), "conditional")["given"]
    assert rows.tolist() == [LAYOUTS.encode(one)] * 2 + [LAYOUTS.encode([])] * 2
    assert layouts().rows(Request(tokens=LAYOUTS.encode(one)), "conditional")["given"].tolist() == [LAYOUTS.encode(one)]


@pytest.mark.parametrize("make", [labels, images, masked, segmentations, layouts])
def test_examples_are_accepted(make: Any) -> None:
    conditioner = make()
    assert conditioner.images(Request(**conditioner.example())) == 1


def test_pil_images_are_rounded_down_to_multiples_and_this_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    picture, mask = Image.fromarray(noise(35, 50, 3)), Image.fromarray(half_mask(35, 50)[..., 0])
    request = Request(image=picture, mask=mask)
    with caplog.at_level(logging.WARNING):
        assert masked().images(request) == 1 and masked().size(request) == (8, 12)
    assert "image: resized from 50 x 35 to 48 x 32 pixels (width, height)" in caplog.text
    expected = np.asarray(picture.resize((48, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1) / 255
    kept = masked().finish(request, np.zeros((1, 3, 32, 48), np.float32))
    np.testing.assert_allclose(kept[0, :, :, 25:], expected[..., 25:], atol=1e-6)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no label": (labels, {}, "labels: got none, expected numbers from 0 to 9"),
    "label out of range": (labels, {"labels": 10}, "labels: got 10, expected a whole number from 0 to 9"),
    "negative label": (labels, {"labels": [0, -1]}, "labels: got -1"),
    "no image": (images, {}, "image: got none, expected one or more images"),
    "one pixel": (images, {"image": Image.new("RGB", (1, 1))}, r"image: got 1 x 1 pixels .*, expected 2\.\.16 x 2\.\."),
    "too large": (images, {"image": np.zeros((17, 8, 3), np.uint8)}, "image: got 17 x 8 pixels"),
    "a number": (images, {"image": 3}, "image: got 3, expected PIL images"),
    "no mask": (masked, {"image": noise(32, 32, 3)}, "mask: got none, expected an image and a mask"),
    "mask of another size": (
        masked,
        {"image": noise(32, 32, 3), "mask": half_mask(32, 28)},
        "mask: got 32 x 28 pixels .height, width., expected the image's 32 x 32",
    ),
    "empty mask": (masked, {"image": noise(32, 32, 3), "mask": 0 * half_mask()}, "mask: got an empty one"),
    "full mask": (masked, {"image": noise(32, 32, 3), "mask": 255 + 0 * half_mask()}, "mask: got a full one"),
    "not a multiple": (
        masked,
        {"image": noise(30, 32, 3), "mask": half_mask(30, 32)},
        r"image: got 30 x 32 pixels .*, expected multiples of 4 from 8\.\.64 x multiples of 4 from 8\.\.64",
    ),
    "two masks for three images": (
        masked,
        {"image": noise(3, 32, 32, 3), "mask": np.stack([half_mask()] * 2)},
        "mask: got 2 masks for 3 images",
    ),
    "no segmentation": (segmentations, {}, "segmentation: got none, expected an image of class numbers from 0 to 6"),
    "unknown class": (
        segmentations,
        {"segmentation": np.full((32, 32), 7)},
        "segmentation: got class 7, expected 0 to 6",
    ),
    "coloured classes": (segmentations, {"segmentation": Image.new("RGB", (32, 32))}, "got an image of mode RGB"),
    "fractions": (segmentations, {"segmentation": np.zeros((32, 32))}, "expected whole numbers"),
    "neither layout nor tokens": (layouts, {}, "layout: got none, expected either a layout"),
    "layout and tokens": (layouts, {"layout": [], "tokens": [0] * 92}, "layout: got tokens and a layout"),
    "too many objects": (layouts, {"layout": [(0, (0, 0, 1, 1))] * 31}, "layout: got 31 objects, expected at most 30"),
    "box outside": (layouts, {"layout": [(0, (0.6, 0, 0.5, 1))]}, r"object 0: got box .*, expected x, y, x \+ width"),
    "box of pixels": (layouts, {"layout": [(0, (10, 10, 50, 60))]}, "object 0: got box"),
    "negative box": (layouts, {"layout": [(0, (-0.1, 0, 0.5, 1))]}, "object 0: got box"),
    "box without an area": (layouts, {"layout": [(0, (0.1, 0.1, 0, 0.5))]}, "and an area"),
    "box of three": (layouts, {"layout": [(0, (0, 0, 1))]}, "expected .x, y, width, height. in shares"),
    "not a box": (layouts, {"layout": [(0, ("a", 0, 1, 1))]}, "expected .x, y, width, height. in shares"),
    "NaN": (layouts, {"layout": [(0, (float("nan"), 0, 1, 1))]}, "expected .x, y, width, height. in shares"),
    "unknown category": (
        layouts,
        {"layout": [("dog", (0, 0, 1, 1))]},
        "got category 'dog', expected one of the model's",
    ),
    "category out of range": (layouts, {"layout": [(500, (0, 0, 1, 1))]}, "expected a name or 0 to 499"),
    "unknown attribute": (layouts, {"layout": [(0, (0, 0, 1, 1), ("large",))]}, "expected some of group, occluded"),
    "no names": (lambda: layouts(0), {"layout": [("dog", (0, 0, 1, 1))]}, "build with --categories FILE"),
    "token out of range": (layouts, {"tokens": [8192] * 92}, "tokens: got 8192, expected 0 to 8191"),
    "too few tokens": (layouts, {"tokens": [0] * 91}, r"expected whole numbers \[92\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case: str) -> None:
    make, fields, message = REFUSED[case]
    with pytest.raises(SpecError, match=message) as error:
        make().images(Request(**fields))
    assert "\n" not in str(error.value)


def test_the_memory_of_larger_images_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"bytes_per_latent": 1000}
    entry = ConditioningSpec("image", "", {}, ("low",), settings)
    model = ModelDescription("super_resolution", {}, (entry,), (), Latents(3, 4), {})
    assert required_bytes(model, (2, 3, 64, 64)) == 2 * 1000 * 64**2
    with caplog.at_level(logging.WARNING):
        report_memory(model, (1, 3, 64, 64), 64**2)
        assert not caplog.records
        report_memory(model, (1, 3, 1024, 1024), 64**2)
    assert "memory: about 1.0 GB beside the weights, as the image is larger than the model's own" in caplog.text
    assert required_bytes(replace(model, conditioning=()), (1, 3, 64, 64)) is None


def test_default_strengths() -> None:
    assert default_strengths({}) == STRENGTHS == (0.8, 1.0)
    assert default_strengths(strength_settings(image=0.3, mask=0.9999)) == (0.3, 0.9999)
    for strength in (0, 10_001):
        with pytest.raises(ManifestError, match=f"mask_strength: got {strength}, expected 1 to 10000; rebuild"):
            default_strengths({"mask_strength": strength})
