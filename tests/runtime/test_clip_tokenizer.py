"""Prompts to ids by CLIP's byte-level BPE, against transformers' CLIPTokenizer loaded from the same folder."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from ldm_export.checkpoint.clip_tokenizer_files import clip_length, write_clip_tokenizer_json
from ldm_export.checkpoint.placeholder_vocabulary import placeholder_clip_tokenizer
from ldm_runtime.conditioning.tokenizer import MAX_CHARACTERS, Tokenizer
from ldm_runtime.errors import CheckpointError, ManifestError
from tests.support.checkpoints import edit_json
from tests.support.clip_vocabulary import END, START, WORDS, clip_tokenizer, published_merges

LENGTHS = (2, 9, 77)
ODD = (
    *(START, END, "<|ENDOFTEXT|>", "<|startoftext|", "'s", "'S", "'re", "n't", "</w>", "Ġ", "  ", "\r\n", "!", "!!"),
    *(
        "👩\u200d🎨",
        "🏳️\u200d🌈",
        "𠀀",
        "ﬁ",
        "İ",
        "ǅ",
        "ς",
        "e\u0301",
        "한국어",
        "مرحبا",
        "&amp;",
        "Ã©",
        "½",
        "１２",
        "Ⅻ",
    ),
    *" \t\n\x00\x07\x1c\x7f\x85\xa0\u2003\u2028\u3000\u200b\u200d\u2060\ufeff\ufffd\xad\u202e\u0301\u0e33",
)
CASES = {
    "empty": "",
    "whitespace": " \t\n\r\xa0\u2003\u3000",
    "sentence": "A photo of the RED circle, and don't!",
    "accents": "café cafe\u0301 naïve ÅNGSTRÖM",
    "case that changes length": "İıßẞǅﬁΣς",
    "scripts": "红色的圆 猫と犬 한국어 𠀀 דג مرحبا привет",
    "emoji": "🎨 👩\u200d🎨 👍🏽 🇫🇷",
    "control characters": "r\x00e\x07d\x1b circle\x7f\x9f \ufeff\xad\ufffd",
    "numbers": "in 2024, 3.14 １２ Ⅻ ½",
    "special tokens": f"a {START} red{END}circle <|ENDOFTEXT|> !",
    "padding token": "wow! !! a!b ! !",
    "long word": "e" * 500,
    "longest prompt": "red! " * (MAX_CHARACTERS // 5),
}
MAKERS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {},
    "Stable Diffusion 2": {"pad_token": "!"},
    "sides": {"padding_side": "left", "truncation_side": "left"},
    "added token": {"additional_special_tokens": ["photo"]},
}
Pair = tuple[CLIPTokenizer, dict[int, Tokenizer]]


def open_pair(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> Pair:
    write_clip_tokenizer_json(folder, folder.parent / "tokenizer.json")
    tokenizers = {length: Tokenizer.from_file(folder.parent / "tokenizer.json", length) for length in lengths}
    return CLIPTokenizer.from_pretrained(folder), tokenizers


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The reference, and the tokenizers of a bundle by length."""
    return open_pair(clip_tokenizer(tmp_path_factory.mktemp("clip") / "tokenizer", **MAKERS[request.param]))


def assert_equal(pair: Pair, prompts: list[str]) -> None:
    reference, by_length = pair
    for length, tokenizer in by_length.items():
        ids = tokenizer(prompts)
        expected = reference(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        assert ids.dtype == np.int64 and ids.shape == (len(prompts), length)
        np.testing.assert_array_equal(ids, expected, err_msg=ascii(prompts))


def test_cases_equal_transformers(pair: Pair) -> None:
    for prompt in CASES.values():
        assert_equal(pair, [prompt])
    assert_equal(pair, list(CASES.values()))


pieces = st.sampled_from(ODD) | st.sampled_from(WORDS) | st.text(string.ascii_letters + " '!", max_size=6)
texts = st.lists(pieces | st.text(max_size=6), max_size=30).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=3))
def test_any_text_equals_transformers(pair: Pair, prompts: list[str]) -> None:
    assert_equal(pair, prompts)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The vocabulary of OpenAI's CLIP, which all models of Stable Diffusion have."""
    return open_pair(clip_tokenizer(tmp_path_factory.mktemp("clip") / "tokenizer", published_merges()), (77,))


def test_the_published_vocabulary(published: Pair) -> None:
    ids = published[1][77](["a photo of an astronaut riding a horse on mars"])[0].tolist()
    expected = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert ids == expected + [49407] * (77 - len(expected))
    for prompt in CASES.values():
        assert_equal(published, [prompt])


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=3))
def test_any_text_with_the_published_vocabulary(published: Pair, prompts: list[str]) -> None:
    assert_equal(published, prompts)


def test_a_folder_as_transformers_saves_it(pair: Pair, tmp_path: Path) -> None:
    reference, by_length = pair
    reference.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").exists()
    _, again = open_pair(tmp_path / "saved")
    for length, tokenizer in by_length.items():
        assert np.array_equal(tokenizer(list(CASES.values())), again[length](list(CASES.values())))


def test_equal_folders_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "other"):
        write_clip_tokenizer_json(clip_tokenizer(tmp_path / name), tmp_path / f"{name}.json")
        contents.append((tmp_path / f"{name}.json").read_bytes())
    assert contents[0] == contents[1]


def test_padding_and_length(tmp_path: Path) -> None:
    folder = clip_tokenizer(tmp_path / "tokenizer", pad_token="!")
    write_clip_tokenizer_json(folder, tmp_path / "tokenizer.json")
    start, end = (json.loads((folder / "vocab.json").read_text(encoding="utf-8"))[token] for token in (START, END))
    assert Tokenizer.from_file(tmp_path / "tokenizer.json", 4)([""]).tolist() == [[start, end, 0, 0]]
    assert clip_length(folder) == 77
    for length, expected in ((16, 16), (10**30, 77), (..., 77)):
        edit_json(folder / "tokenizer_config.json", model_max_length=length)
        assert clip_length(folder) == expected
    placeholder_clip_tokenizer(folder, tmp_path)
    write_clip_tokenizer_json(tmp_path, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", None, "has no vocab.json"),
        ("merges.txt", None, "has no merges.txt"),
        ("vocab.json", "{", "not JSON"),
        ("vocab.json", "[]", "holds a JSON list, expected an object"),
        ("vocab.json", '{"a": 4294967295}', "token 'a' has id 4294967295, expected 0 to 1048575"),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}', "token 'a' has id -1, expected 0 to 1048575"),
        ("vocab.json", '{"a": 0}', "not a CLIP tokenizer|not in the vocabulary|not CLIP's byte-level BPE"),
        ("merges.txt", "#version: 0.2\nx yz\n", "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "got class 'T5Tokenizer', expected CLIPTok"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", '{"pad_token": "[PAD]"}', "not CLIP's byte-level BPE with its special tokens"),
        ("tokenizer.json", "{}", "not a CLIP tokenizer"),
    ],
    ids=str,
)
def test_damaged_folders(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = clip_tokenizer(tmp_path / "tokenizer")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        write_clip_tokenizer_json(folder, tmp_path / "tokenizer.json")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "dropout"), 0.5),
        (("model", "end_of_word_suffix"), None),
        (("normalizer", "normalizers", 1, "pattern", "Regex"), "(a+)+$"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(a+)+$"),
        (("pre_tokenizer", "pretokenizers"), []),
        (("post_processor", "special_tokens"), {}),
        (("padding", "pad_token"), "[PAD]"),
    ],
    ids=str,
)
def test_refused_documents(tmp_path: Path, keys: tuple[Any, ...], value: Any) -> None:
    file = tmp_path / "tokenizer.json"
    write_clip_tokenizer_json(clip_tokenizer(tmp_path / "tokenizer"), file)
    entry = document = json.loads(file.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="not a tokenizer"):
        Tokenizer.from_file(file, 77)
