"""What the reader sees: rendered truth, close neighbours, damaged images and things outside the language."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data import loosen
from ldm_export_demo.drawing import PALETTE, PIXELS, Figure, Scene, arrange, coverage, draw
from ldm_export_demo.grader import compare, grade
from ldm_export_demo.grammar import BACKGROUNDS, COLOURS, SHAPES, parse, random_sentence
from ldm_export_demo.reader import MIN_FIT, read


def blurred(image, radius):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(image, subsampling):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=subsampling)
    return np.asarray(Image.open(file).convert("RGB"))


def shifted(image, by):
    return np.clip(image.astype(float) + by, 0, 255).astype(np.uint8)


def noisy(image, deviation):
    return shifted(image, np.random.default_rng(int(image.sum())).normal(0, deviation, image.shape))


def share_right(change, number, seed):
    rng = np.random.default_rng(seed)
    sentences = [random_sentence(rng, 0.5) for _ in range(number)]
    return np.mean([grade(change(draw(arrange(sentence, rng))), sentence).correct for sentence in sentences])


def on_white(alpha, colour="green"):
    ink = np.asarray(PALETTE[colour], np.float32)
    return np.rint(255 + alpha[..., None] * (ink - 255)).astype(np.uint8)


def test_rendered_truth_is_right_and_read_to_a_third_of_a_pixel():
    rng = np.random.default_rng(1)
    for index in range(150):
        sentence = random_sentence(rng, 0.6)
        if index % 2:
            sentence = loosen(sentence, rng, 0.4)
        scene = arrange(sentence, rng)
        reading = read(draw(scene))
        assert compare(reading, sentence).correct, (sentence, reading)
        assert (reading.background, reading.leftovers) == (scene.background, 0)
        for figure in scene.figures:
            result = min(reading.objects, key=lambda o: np.hypot(o.x - figure.x, o.y - figure.y))
            assert (result.colour, result.shape) == (figure.colour, figure.shape)
            assert np.hypot(result.x - figure.x, result.y - figure.y) < 1 / 3
            assert result.fit > MIN_FIT


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closest_two_objects_do_not_merge(shape, background):
    for first in COLOURS:
        for second in sorted({"red", "blue", "purple", "yellow", first}):
            if background in (first, second):
                continue
            figures = (Figure(first, shape, 12.5, 18, 32), Figure(second, "square", 12.5, 46, 32))
            image = draw(Scene(background, figures))
            sentence = parse(f"a large {first} {shape} left of a large {second} square on a {background} background")
            assert grade(image, sentence).correct
            assert grade(blurred(image, 0.8), sentence).correct


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        pytest.param(lambda image: noisy(image, 6), 1.0, id="noise of 6 levels"),
        pytest.param(lambda image: blurred(image, 0.6), 1.0, id="blur of 0.6 pixels"),
        pytest.param(lambda image: blurred(image, 1.0), 1.0, id="blur of 1 pixel"),
        pytest.param(lambda image: jpeg(image, subsampling=0), 1.0, id="jpeg 90"),
        pytest.param(lambda image: jpeg(image, subsampling=2), 0.95, id="jpeg 90 with halved chroma"),
        pytest.param(lambda image: shifted(image, 8), 1.0, id="8 brighter"),
        pytest.param(lambda image: shifted(image, -8), 1.0, id="8 darker"),
    ],
)
def test_mild_damage_leaves_images_right(damage, least):
    assert share_right(damage, 100, seed=8) >= least


@pytest.mark.parametrize(
    "ruin",
    [
        pytest.param(lambda image: np.full_like(image, image[0, 0]), id="flat"),
        pytest.param(lambda image: blurred(image, 4), id="blur of 4 pixels"),
        pytest.param(lambda image: 255 - image, id="inverted"),
        pytest.param(lambda image: noisy(image, 60), id="drowned in noise"),
        pytest.param(lambda image: image // 2, id="half as bright"),
        pytest.param(lambda image: np.tile(image[::2, ::2], (2, 2, 1)), id="four small copies"),
    ],
)
def test_ruined_images_are_never_right(ruin):
    assert share_right(ruin, 50, seed=6) == 0.0


def test_pure_noise_is_nothing_but_leftovers():
    reading = read(np.random.default_rng(7).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8))
    assert (reading.background, reading.objects, reading.leftovers) == (None, (), PIXELS * PIXELS)


def test_an_uneven_background_is_none():
    image = on_white(coverage("circle", 12, 32, 32))
    assert read(noisy(image, 6)).background == "white"
    assert read(noisy(image, 30)).background is None
    assert read(shifted(image, -2.0 * np.arange(PIXELS)[:, None])).background is None


def test_a_soft_edge_is_no_shape():
    (result,) = read(blurred(on_white(coverage("circle", 12, 32, 32)), 2.5)).objects
    assert result.fit > MIN_FIT
    assert (result.shape, result.size) == (None, "large")


def test_half_circle_half_square_is_neither():
    x, y = np.meshgrid(np.arange(PIXELS) - 31.5, np.arange(PIXELS) - 31.5)
    rounded = np.clip(11 - np.cbrt(abs(x) ** 3 + abs(y) ** 3) + 0.5, 0, 1)
    (result,) = read(on_white(rounded)).objects
    assert result.fit > MIN_FIT
    assert result.shape is None


@pytest.mark.parametrize("colour", PALETTE)
def test_a_flat_image_has_a_background_at_most(colour):
    reading = read(np.full((PIXELS, PIXELS, 3), PALETTE[colour], np.uint8))
    assert (reading.background, reading.objects) == (colour if colour in BACKGROUNDS else None, ())
    assert reading.leftovers == 0


def test_foreign_shapes_have_no_name():
    x, y = np.meshgrid(np.arange(PIXELS) - 31.5, np.arange(PIXELS) - 31.5)
    foreign = {
        "diamond": np.clip((14 - abs(x) - abs(y)) / 2**0.5 + 0.5, 0, 1),
        "triangle upside down": coverage("triangle", 12, 32, 32)[::-1],
        "triangle on its side": coverage("triangle", 12, 32, 32).T,
        "ellipse": np.clip((1 - np.hypot(x / 12, y / 9)) * 10 + 0.5, 0, 1),
        "rectangle": np.clip(10.5 - abs(x), 0, 1) * np.clip(7.5 - abs(y), 0, 1),
        "ring": coverage("circle", 12, 32, 32) - coverage("circle", 6, 32, 32),
    }
    for name, alpha in foreign.items():
        (result,) = read(on_white(alpha)).objects
        assert (result.colour, result.shape) == ("green", None), name


@pytest.mark.parametrize("colour", [(255, 150, 200), (0, 220, 220), (130, 80, 40), (150, 220, 40)])
def test_foreign_colours_have_no_name(colour):
    image = on_white(coverage("square", 12, 32, 32))
    image[(image != 255).any(-1)] = colour
    (result,) = read(image).objects
    assert (result.colour, result.shape, result.size) == (None, "square", "large")


def test_other_arrays_are_refused():
    image = on_white(coverage("square", 12, 32, 32))
    with pytest.raises(ValueError, match=r"float32 \[64, 64, 3\], expected uint8 \[64, 64, 3\]"):
        read(image.astype(np.float32))
    with pytest.raises(ValueError, match=r"uint8 \[32, 64, 3\]"):
        read(image[:32])
