"""Prompts to ids, against transformers' BertTokenizer loaded from the same folder."""

import json
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from ldm_export.checkpoint.tokenizer_files import write_tokenizer_json
from ldm_runtime.conditioning import tokenizer as module
from ldm_runtime.conditioning.tokenizer import MAX_CHARACTERS, MAX_LENGTH, Tokenizer
from ldm_runtime.errors import ManifestError, SpecError
from text import TOKENS, make_tokenizer, vocabulary

PAD, UNK, CLS, SEP, MASK = range(5)
SHORT = 9
WORDS = (
    *("red", "circle", "Red", "CIRCLE", "a", "an", "on", "zebra", "café", "cafe\u0301", "Über", "naïve", "ÅNGSTRÖM"),
    *("猫", "日本語", "ねこ", "한국어", "привет", "Ελληνικά", "שלום", "مرحبا", "fiancé", "İstanbul", "straße", "ﬁn"),
)
SCRIPTS = "éèêëïöüÅÉÖÜßñçøıİπρЯжשםمح猫犬日本語ねこ한국어🎨🙂\u0301\u0308\u0327"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ODD = (
    *(*SPECIAL, "[mask]", "[ MASK ]", "##s", "##", "  ", "\r\n", "👩\u200d🎨", "🏳️\u200d🌈", "𠀀"),
    *"[]'_…€ \t\n\x00\x07\x1c\x7f\x85\xa0\u2003\u2028\u3000\u200b\u200d\u2060\ufeff\ufffd\xad\u202e\u0301\u0e33",
)
CASES = {
    "empty": "",
    "whitespace": " \t\n\r\xa0\u2003\u3000",
    "sentence": "a small red circle above a large blue square on white",
    "composed accents": "un cercle bleu foncé à gauche, naïve café",
    "decomposed accents": "un cercle bleu fonce\u0301 a\u0300 gauche, nai\u0308ve cafe\u0301",
    "stacked marks": "z" + "\u0301\u0308\u0327" * 40 + "a",
    "marks alone": "\u0301\u0308 \u0327",
    "upper case": "A RED CIRCLE, Über İstanbul ÅNGSTRÖM STRASSE",
    "case that changes length": "İıßẞǅﬁΣς",
    "CJK": "红色的圆 猫と犬 日本語 한국어 𠀀",
    "emoji": "🎨 👩\u200d🎨 👍🏽 🏳️\u200d🌈 🇫🇷",
    "control characters": "r\x00e\x07d\x1b circle\x7f\x9f",
    "zero width": "re\u200bd\u200d cir\u2060cle \ufeff\xad\ufffd",
    "tabs and newlines": "red\tcircle\nblue\r\nsquare\u2028green\x85white",
    "right to left": "דג אדום \u202eder\u202c مرحبا",
    "punctuation": "red,circle!?...(blue)-square_green'white\"–—“”¿€",
    "typed special tokens": "a [MASK] [PAD] red[SEP]circle [CLS][UNK] [mask] [ MASK ]",
    "continuation typed": "##s circle##s",
    "word of 100": "e" * 100,
    "word of 101": "e" * 101,
    "word of 100 after cleaning": "e" * 100 + "\u0301\x00",
    "unknown word": "zebra ☃ qqq",
    "private use and unassigned": "\ue000 \U000e0001 \u0378",
    "longest prompt": "red " * (MAX_CHARACTERS // 4),
}


def large_vocabulary():
    """Latin, Greek, Cyrillic and the SCRIPTS, in both cases, alone and as continuations, and words of them."""
    ranges = ((0x30, 0x3A), (0x41, 0x5B), (0x61, 0x7B), (0xC0, 0x180), (0x391, 0x460))
    letters = [*SCRIPTS, *(chr(c) for span in ranges for c in range(*span))]
    words = [*WORDS, *(word.lower() for word in WORDS), "cafe", "naive", "uber", "##cle", "##ΣΣ", "Ci", "[mask]"]
    return list(dict.fromkeys([*SPECIAL, *words, *letters, *string.punctuation, *(f"##{c}" for c in letters)]))


def published(folder, **config):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(large_vocabulary()) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return BertTokenizer.from_pretrained(folder)


MAKERS = {
    "shapes": make_tokenizer,
    "cased": lambda folder: published(folder, do_lower_case=False),
    "uncased with accents": lambda folder: published(folder, do_lower_case=True, strip_accents=False),
    "cased without accents": lambda folder: published(folder, do_lower_case=False, strip_accents=True),
    "CJK as words": lambda folder: published(folder, tokenize_chinese_chars=False),
}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, tmp_path_factory):
    """The reference, and the tokenizers of a bundle by length."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    reference = MAKERS[request.param](folder)
    write_tokenizer_json(folder, folder.parent / "tokenizer.json")
    return reference, {n: Tokenizer.from_file(folder.parent / "tokenizer.json", n) for n in (2, SHORT, TOKENS)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """tokenizer.json of the shapes model; its first ids are PAD, UNK, CLS, SEP, MASK."""
    folder = tmp_path_factory.mktemp("shapes")
    make_tokenizer(folder / "tokenizer")
    write_tokenizer_json(folder / "tokenizer", folder / "tokenizer.json")
    return folder / "tokenizer.json"


def assert_equal(pair, prompts):
    reference, by_length = pair
    for length, tokenizer in by_length.items():
        ids = tokenizer(prompts)
        expected = reference(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        assert ids.dtype == np.int64 and ids.shape == (len(prompts), length)
        np.testing.assert_array_equal(ids, expected, err_msg=ascii(prompts))


@pytest.mark.parametrize("case", CASES)
def test_case_equals_transformers(pair, case):
    assert_equal(pair, [CASES[case]])


def test_batch_equals_transformers(pair):
    assert_equal(pair, list(CASES.values()))


letters = st.text(SCRIPTS + string.ascii_letters, max_size=6)
pieces = st.sampled_from(WORDS) | st.sampled_from(ODD) | st.sampled_from(vocabulary()) | letters | st.text(max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(pieces, max_size=30).map("".join), min_size=1, max_size=3))
def test_any_text_equals_transformers(pair, prompts):
    assert_equal(pair, prompts)


def test_ids_of_the_shapes_vocabulary(shapes):
    tokenizer, index = Tokenizer.from_file(shapes, 8), {token: i for i, token in enumerate(vocabulary())}
    red, circle, z, e = (index[token] for token in ("red", "circle", "z", "##e"))
    ids = tokenizer(["", "red Circle", "Rěd\u0301 [MASK]", "ze ☃", "z" + "e" * 99, "z" + "e" * 100])
    assert ids.tolist() == [
        [CLS, SEP, *[PAD] * 6],
        [CLS, red, circle, SEP, *[PAD] * 4],
        [CLS, red, MASK, SEP, *[PAD] * 4],
        [CLS, z, e, UNK, SEP, *[PAD] * 3],
        [CLS, z, *[e] * 5, SEP],
        [CLS, UNK, SEP, *[PAD] * 5],
    ]


@pytest.mark.parametrize(("words", "tail"), [(6, [SEP, PAD]), (7, [SEP]), (8, [SEP]), (80, [SEP])])
def test_truncation_keeps_both_ends(shapes, words, tail):
    red = vocabulary().index("red")
    ids = Tokenizer.from_file(shapes, SHORT)([" ".join(["red"] * words)])
    assert ids.tolist() == [[CLS, *[red] * min(words, SHORT - 2), *tail]]


def test_threads_share_a_tokenizer(shapes):
    tokenizer, prompts = Tokenizer.from_file(shapes, TOKENS), list(CASES.values())
    expected = tokenizer(prompts)
    assert tokenizer([]).shape == (0, TOKENS)
    with ThreadPoolExecutor(4) as pool:
        for ids in pool.map(tokenizer, [prompts] * 8):
            np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a red circle", "prompts: got one str"),
        (None, "prompts: got one NoneType"),
        (iter(["red"]), "prompts: got one list_iterator"),
        (["red", None], "prompt 1: got NoneType"),
        ([b"red"], "prompt 0: got bytes"),
        (["x" * (MAX_CHARACTERS + 1)], "prompt 0: got 50001 characters, expected at most 50000"),
        (["red", "x" * 100_000], "prompt 1: got 100000 characters"),
        (["\ud83d"], r"prompt 0: character 0 is the lone surrogate U\+D83D"),
        (["red", "red \udc9f circle"], r"prompt 1: character 4 is the lone surrogate U\+DC9F"),
        ([b"r\xe9d".decode("utf-8", "surrogateescape")], r"character 1 is the lone surrogate U\+DCE9"),
    ],
)
def test_refused_prompts(shapes, prompts, message):
    with pytest.raises(SpecError, match=message) as refusal:
        Tokenizer.from_file(shapes, TOKENS)(prompts)
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [-1, 0, 1, True, 77.0, "77", None, MAX_LENGTH + 1, 10**30])
def test_refused_lengths(shapes, length):
    with pytest.raises(SpecError, match="length"):
        Tokenizer.from_file(shapes, length)


def edited(shapes, path, *keys, value):
    """A copy of the tokenizer's file with one entry changed."""
    document = json.loads(shapes.read_text())
    entry = document
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model", "type"), "WordLevel", "not a tokenizer of BERT or CLIP"),
        (("model", "unk_token"), "[OOPS]", "not a tokenizer of BERT or CLIP"),
        (("model", "vocab"), {"[UNK]": 1}, "not a tokenizer of BERT or CLIP"),
        (("model", "vocab", "red"), -1, "not a tokenizer"),
        (("normalizer",), None, "not a tokenizer of BERT or CLIP"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "not a tokenizer of BERT or CLIP"),
        (("post_processor",), None, "not a tokenizer of BERT or CLIP"),
        (("post_processor", "single"), [{"Sequence": {"id": "B", "type_id": 0}}], "not a tokenizer of BERT or CLIP"),
        (("post_processor", "special_tokens"), {}, "not a tokenizer"),
        (("post_processor", "special_tokens", "[CLS]", "ids"), [2] * 99, "not a tokenizer of BERT or CLIP"),
        (("post_processor", "special_tokens", "[CLS]", "ids"), [2**31], "not a tokenizer of BERT or CLIP"),
        (("padding",), {"pad_token": "[PAD]"}, "not a tokenizer"),
        (("padding",), {"pad_token": "[OOPS]"}, "not a tokenizer of BERT or CLIP"),
        (("post_processor", "special_tokens", "[SEP]", "tokens"), [], "not a tokenizer of BERT or CLIP"),
        (("added_tokens",), 7, "not a tokenizer"),
    ],
)
def test_refused_documents(shapes, tmp_path, keys, value, message):
    with pytest.raises(ManifestError, match=message) as refusal:
        Tokenizer.from_file(edited(shapes, tmp_path / "tokenizer.json", *keys, value=value), TOKENS)
    assert str(tmp_path / "tokenizer.json") in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"model": "WordPiece"}'])
def test_refused_bytes(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"tokenizer.json: not a"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", TOKENS)


def test_refused_files(shapes, tmp_path, monkeypatch):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ManifestError, match="no such file"):
            Tokenizer.from_file(path, TOKENS)
    monkeypatch.setattr(module, "MAX_BYTES", shapes.stat().st_size - 1)
    with pytest.raises(ManifestError, match="expected at most"):
        Tokenizer.from_file(shapes, TOKENS)


def test_padding_token_of_the_file(shapes, tmp_path):
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": UNK, "pad_type_id": 0, "pad_token": "[UNK]"}
    path = edited(shapes, tmp_path / "tokenizer.json", "padding", value=padding)
    assert Tokenizer.from_file(path, 4)([""]).tolist() == [[CLS, SEP, UNK, UNK]]


def test_imports_neither_transformers_nor_torch():
    heavy = "{'transformers', 'torch', 'onnx'} & set(sys.modules)"
    code = f"import sys, ldm_runtime.conditioning.tokenizer; print(sorted({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_prompt_that_is_cut_off_is_logged(shapes, caplog):
    caplog.set_level("WARNING")
    tokenizer = Tokenizer.from_file(shapes, 5)
    tokenizer(["red circle red", ""])
    assert not caplog.records
    tokenizer(["red circle red circle", "red"])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = "prompt: only 14 of its 21 characters are used, because the model takes 5 tokens; shorten it"
    assert record.getMessage() == message
