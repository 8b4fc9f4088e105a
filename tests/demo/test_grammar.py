"""The language of the shapes domain: sentences, refusals and the held-out split."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loosen, training_sentence
from ldm_export_demo.drawing import arrange
from ldm_export_demo.grammar import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Sentence,
    Thing,
    held_out_prompts,
    is_held_out,
    one_object_sentences,
    parse,
    two_object_sentences,
)

HELD_OUT_ONE, HELD_OUT_TWO = 203, 3451
"""Held-out sentences of each kind; another number means another split, and a model trained on its own exam."""


def maybe(names):
    return st.none() | st.sampled_from(tuple(names))


things = st.builds(Thing, st.sampled_from(COLOURS), st.sampled_from(SHAPES), maybe(SIZES))
sentences = st.builds(
    Sentence, st.tuples(things), place=maybe(PLACES), relation=st.none(), background=maybe(BACKGROUNDS)
) | st.builds(
    Sentence,
    st.tuples(things, things),
    place=st.none(),
    relation=st.sampled_from(RELATIONS),
    background=maybe(BACKGROUNDS),
)


@pytest.fixture(scope="module")
def held_out():
    return [str(s) for s in chain(one_object_sentences(), two_object_sentences()) if is_held_out(s)]


@settings(deadline=None)
@given(sentences)
def test_a_sentence_reads_back_as_itself(sentence):
    assert parse(str(sentence)) == sentence


@settings(deadline=None)
@given(sentences)
def test_case_spacing_and_the_article_do_not_matter(sentence):
    text = str(sentence)
    assert parse(f"  {text.upper()} ".replace(" ", "\t ")) == sentence
    assert parse(" ".join(word for word in text.split() if word != "an")) == sentence


def test_a_sentence_reads_as_written():
    assert str(Sentence((Thing("orange", "cross"),))) == "an orange cross"
    assert parse("a small red circle at the top left on a white background") == Sentence(
        (Thing("red", "circle", "small"),), place="at the top left", background="white"
    )
    assert parse("a blue square right of a large yellow triangle") == Sentence(
        (Thing("blue", "square"), Thing("yellow", "triangle", "large")), relation="right of"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a circle",
        "a red",
        "a red hexagon",
        "a pink circle",
        "a huge red circle",
        "a red small circle",
        "a small small red circle",
        "two red circles",
        "a red circle on a pink background",
        "a red circle on a background",
        "a red circle on a white",
        "on a white background",
        "a red circle at the middle",
        "a red circle at the top at the left",
        "a red circle left of",
        "a red circle beside a blue square",
        "a red circle left of a blue square at the top",
        "a red circle left of a blue square left of a green cross",
        "a red circle left of a blue square above a green cross",
        "a red circle on a white background on a black background",
        "a red circle, please",
    ],
)
def test_what_is_not_in_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match=r"grammar|background"):
        parse(text)


def test_the_held_out_split_is_fixed(held_out):
    assert sum(parse(text).place is not None for text in held_out) == HELD_OUT_ONE
    assert len(held_out) == len(set(held_out)) == HELD_OUT_ONE + HELD_OUT_TWO
    everything = sum(1 for _ in chain(one_object_sentences(), two_object_sentences()))
    assert 0.09 < len(held_out) / everything < 0.11


def test_training_never_shows_a_held_out_sentence(held_out):
    rng, forbidden = np.random.default_rng(3), set(held_out)
    training = [training_sentence(rng) for _ in range(3000)]
    assert forbidden.isdisjoint(map(str, training))
    assert forbidden.isdisjoint(str(loosen(sentence, rng, 0.5)) for sentence in training)
    assert {len(sentence.things) for sentence in training} == {1, 2}


def test_loosening_only_opens_parts():
    rng = np.random.default_rng(4)
    for _ in range(200):
        full = training_sentence(rng)
        loose = loosen(full, rng, 0.5)
        assert loose.relation == full.relation
        assert loose.place in (None, full.place)
        assert loose.background in (None, full.background)
        for opened, thing in zip(loose.things, full.things, strict=True):
            assert opened in (thing, Thing(thing.colour, thing.shape))


def test_held_out_prompts_are_a_reproducible_sample(held_out):
    prompts = held_out_prompts(30, 50, seed=1)
    assert [len(parse(prompt).things) for prompt in prompts] == [1] * 30 + [2] * 50
    assert len(set(prompts)) == 80
    assert set(prompts) <= set(held_out)
    assert prompts == held_out_prompts(30, 50, seed=1) != held_out_prompts(30, 50, seed=2)
    assert held_out_prompts(30, 0, seed=1) == prompts[:30]


def test_more_prompts_than_are_held_out_are_refused():
    assert len(held_out_prompts(HELD_OUT_ONE, 0)) == HELD_OUT_ONE
    with pytest.raises(ValueError, match=f"{HELD_OUT_ONE + 1} held-out prompts requested, {HELD_OUT_ONE} exist"):
        held_out_prompts(HELD_OUT_ONE + 1, 0)


@settings(deadline=None)
@given(sentences, st.integers(0, 2**32 - 1))
def test_a_scene_is_what_its_sentence_says(sentence, seed):
    scene = arrange(sentence, np.random.default_rng(seed))
    assert [(figure.colour, figure.shape) for figure in scene.figures] == [(t.colour, t.shape) for t in sentence.things]
    assert sentence.background in (None, scene.background)
    for figure in scene.figures:
        assert figure.radius < min(figure.x, figure.y)
        assert max(figure.x, figure.y) + figure.radius < 64
