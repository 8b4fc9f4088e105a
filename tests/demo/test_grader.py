"""The grader against images with exactly one thing wrong, and the shares it counts."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_export_demo.drawing import PALETTE, RADIUS, Figure, Scene, arrange, coverage, draw
from ldm_export_demo.grader import ATTRIBUTES, Grade, accuracy, grade
from ldm_export_demo.grammar import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Sentence,
    parse,
    random_sentence,
)


def wrong(image: np.ndarray, sentence: Sentence | str) -> set[str]:
    """The attributes that the grader finds wrong."""
    result = grade(image, parse(sentence) if isinstance(sentence, str) else sentence)
    return {name for name in ATTRIBUTES if not getattr(result, name)}


def image_of(text: str, seed: int = 0) -> np.ndarray:
    return draw(arrange(parse(text), np.random.default_rng(seed)))


def paint(image: np.ndarray, colour: str, alpha: np.ndarray) -> np.ndarray:
    over = np.asarray(PALETTE[colour], np.float32)
    return np.rint(image + alpha[..., None] * (over - image)).astype(np.uint8)


def test_open_parts_are_not_judged():
    image = image_of("a small red circle at the top left on a white background")
    assert wrong(image, "a red circle") == set()
    assert wrong(image, "a large red circle at the top left on a white background") == {"size"}
    assert wrong(image, "a red circle at the right on a white background") == {"position"}
    assert wrong(image, "a red circle at the top left on a gray background") == {"background"}
    assert wrong(image, "a blue cross") == {"colour", "shape"}


def _other(names, current, rng, barred=()):
    names = [name for name in names if name != current and name not in barred]
    return names[rng.integers(len(names))]


def _changed(sentence: Sentence, attribute: str, rng: np.random.Generator) -> Sentence:
    """The sentence with one attribute, of one of its things, made another."""
    at = int(rng.integers(len(sentence.things)))
    thing = sentence.things[at]
    if attribute == "background":
        colours = [thing.colour for thing in sentence.things]
        return replace(sentence, background=_other(BACKGROUNDS, sentence.background, rng, colours))
    if attribute == "position" and sentence.place:
        return replace(sentence, place=_other(PLACES, sentence.place, rng))
    if attribute == "position":
        return replace(sentence, relation=_other(RELATIONS, sentence.relation, rng))
    names = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[attribute]
    barred = [sentence.background] if attribute == "colour" else []
    changed = replace(thing, **{attribute: _other(names, getattr(thing, attribute), rng, barred)})
    return replace(sentence, things=(*sentence.things[:at], changed, *sentence.things[at + 1 :]))


@pytest.mark.parametrize("attribute", ["background", "colour", "shape", "size", "position"])
def test_one_wrong_attribute_fails_alone(attribute):
    rng = np.random.default_rng(2)
    for _ in range(120):
        prompt = random_sentence(rng, 0.5)
        if len(set(prompt.things)) < len(prompt.things):
            continue  # identical things: their order is nobody's fault
        other = _changed(prompt, attribute, rng)
        assert wrong(draw(arrange(other, rng)), prompt) == {attribute}, (str(prompt), str(other))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("other", [name for name in PALETTE if name != "white"])
def test_every_other_colour_is_distinguished(colour, other):
    image = draw(Scene("white", (Figure(other, "cross", 8, 32, 32),)))
    assert wrong(image, f"a {colour} cross on a white background") == (set() if colour == other else {"colour"})


def test_colours_bound_to_the_wrong_objects_fail():
    prompt = "a small red circle left of a large blue square on a white background"
    assert wrong(image_of("a small blue circle left of a large red square on a white background"), prompt) == {"colour"}
    assert wrong(image_of("a large blue square left of a small red circle on a white background"), prompt) == {
        "position"
    }
    assert wrong(image_of("a large red circle left of a small blue square on a white background"), prompt) == {"size"}
    assert wrong(image_of("a small red square left of a large blue circle on a white background"), prompt) == {"shape"}


@pytest.mark.parametrize("radius", [4.5, 15.5])
def test_a_radius_far_from_both_sizes_is_no_size(radius):
    image = draw(Scene("black", (Figure("green", "square", radius, 32, 32),)))
    assert [wrong(image, f"a {size} green square") for size in SIZES] == [{"size"}, {"size"}]


@pytest.mark.parametrize(("x", "right"), [(48, True), (43, True), (40.5, False), (55, False)])
def test_a_place_ends_six_pixels_from_its_centre(x, right):
    image = draw(Scene("gray", (Figure("red", "circle", 8, x, 32),)))
    assert wrong(image, "a red circle at the right") == (set() if right else {"position"})


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("radius", [3.0, 8.0])
def test_an_extra_object_fails(background, radius):
    for colour in [name for name in PALETTE if name != background]:
        prompt = f"a large {'red' if colour != 'red' else 'blue'} cross in the center on a {background} background"
        image = paint(image_of(prompt), colour, coverage("circle", radius, 8, 56))
        assert wrong(image, prompt) == {"count"}, colour


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_spot_of_four_by_four_pixels_fails(background):
    prompt = f"a large blue square in the center on a {background} background"
    beside, inside = np.s_[3:7, 50:54], np.s_[28:32, 30:34]
    spots = [(beside, colour) for colour in PALETTE if colour != background]
    for at, colour in [*spots, (inside, "red"), (inside, "green")]:
        image = image_of(prompt)
        image[at] = PALETTE[colour]
        assert wrong(image, prompt) == {"count"}, (colour, at)


def test_a_missing_object_fails():
    prompt = "a small red circle above a large blue square on a white background"
    assert "count" in wrong(draw(Scene("white", (Figure("red", "circle", 8, 32, 16),))), prompt)
    assert wrong(draw(Scene("white", ())), prompt) == set(ATTRIBUTES) - {"background"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_half_an_object_fails(shape, size):
    whole = coverage(shape, RADIUS[size], 32, 32)
    for half in (np.s_[:, 32:], np.s_[:, :32], np.s_[32:, :]):
        alpha = whole.copy()
        alpha[half] = 0
        image = paint(draw(Scene("yellow", ())), "purple", alpha)
        result = wrong(image, f"a {size} purple {shape} in the center")
        assert result & {"shape", "size"}, result


@pytest.mark.parametrize("second", ["red", "blue"])
def test_merged_objects_fail(second):
    figures = (Figure("red", "circle", 12, 22, 32), Figure(second, "square", 12, 42, 32))
    text = f"a large red circle left of a large {second} square on a white background"
    assert "count" in wrong(draw(Scene("white", figures)), text)


def test_an_object_of_two_colours_fails():
    image = image_of("a large red square in the center on a white background")
    image[32:][(image[32:] != 255).any(-1)] = PALETTE["blue"]
    for colour in ("red", "blue"):
        prompt = f"a large {colour} square in the center on a white background"
        assert {"count", "colour"} <= wrong(image, prompt)


def test_accuracy_counts_each_kind_apart():
    one = "a small red circle at the top left on a white background"
    two = "a small red circle left of a large blue square on a white background"
    result = accuracy([image_of(one), image_of(one), image_of(two), image_of(one)], [one, "a red cross", two, two])
    assert (result.overall.number, result.overall.correct) == (4, 0.5)
    assert (result.overall.background, result.overall.count, result.overall.shape) == (1.0, 0.75, 0.5)
    assert (result.one_object.number, result.one_object.correct, result.one_object.shape) == (2, 0.5, 0.5)
    assert (result.two_objects.number, result.two_objects.correct, result.two_objects.count) == (2, 0.5, 0.5)
    assert accuracy([image_of(two)], [two]).one_object is None


def test_accuracy_refuses_what_it_cannot_grade():
    one = "a small red circle"
    with pytest.raises(ValueError, match="no images"):
        accuracy([], [])
    with pytest.raises(ValueError, match="argument"):
        accuracy([image_of(one)], [one, one])
    with pytest.raises(ValueError, match="grammar"):
        accuracy([image_of(one)], ["a photograph of a cat"])


def test_a_grade_is_right_only_as_a_whole():
    assert Grade(*[True] * 6).correct
    for name in ATTRIBUTES:
        assert not replace(Grade(*[True] * 6), **{name: False}).correct
