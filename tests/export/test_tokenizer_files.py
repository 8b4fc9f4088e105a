"""Every published layout of a tokenizer's folder gives the ids transformers gives; anything else is refused."""

import json
import logging
import os

import numpy as np
import pytest
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertTokenizer

from ldm_export.checkpoint import tokenizer_files
from ldm_export.checkpoint.tokenizer_files import write_tokenizer_json
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.errors import CheckpointError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["red", "Red", "circle", "café", "cafe", "猫", "猫犬", *"aAÉe", "<s>", "</s>", "<pad>", "<unk>", "[NEW]"]
VOCABULARY = [*SPECIAL, *WORDS, *(f"##{c}" for c in "edRDcirlaféÉ"), *"dRDcirlf<>[]/!.#"]
RENAMED = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "[NEW]"}
PROMPTS = [
    *("", "red Red CIRCLE", "café cafe\u0301 CAFÉ É", "猫犬 猫", "zebra", "a" * 101, "red " * 99, "<s> <pad>a</s>"),
    *("a [MASK] red[SEP]circle [PAD] [CLS] [UNK] [mask]", "<unk> [NEW] [new] red[MASK]", "<cat> <CAT>red <dog> <D>"),
]


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def json_form(part=None, **changes):
    """The contents of a tokenizer.json of the tokenizers library, with changes in one part of it."""
    fast = BertWordPieceTokenizer({text: i for i, text in enumerate(VOCABULARY)}, lowercase=True)
    document = json.loads(fast.to_str())
    (document[part] if part else document).update(changes)
    return {"tokenizer.json": document}


def vocab_form(*tokens, end="\n"):
    return {"vocab.txt": "".join(text + end for text in tokens or VOCABULARY)}


def config(**entries):
    return {"tokenizer_config.json": entries}


def folder_of(path, files):
    """A folder of the given files: text, bytes, or what is to be written as JSON."""
    path.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
VOCAB = vocab_form()
CASED = json_form("normalizer", lowercase=False, strip_accents=False)
TRUNCATION = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 6}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
INDEX = dict(zip(VOCABULARY, range(99), strict=False))
TYPELESS = {key: value for key, value in json_form()["tokenizer.json"]["model"].items() if key != "type"}
CAT, DOG = token("<cat>", normalized=True, special=False), token("<dog>", lstrip=True, rstrip=True, special=True)
MASK = token("[MASK]", single_word=True, special=True)

LAYOUTS = {
    "vocab.txt alone": VOCAB,
    "do_lower_case false": VOCAB | config(do_lower_case=False),
    "strip_accents false": VOCAB | config(strip_accents=False),
    "strip_accents true, cased": VOCAB | config(do_lower_case=False, strip_accents=True),
    "CJK as words": VOCAB | config(tokenize_chinese_chars=False),
    "names in the config": VOCAB | config(**RENAMED),
    "names as tokens": VOCAB | config(**{k: {"__type": "AddedToken", "content": t} for k, t in RENAMED.items()}),
    "names in the map": VOCAB | {MAP: RENAMED},
    "map over config": VOCAB | config(**RENAMED) | {MAP: {"pad_token": "[PAD]"}},
    "map of objects": VOCAB | {MAP: {key: token(text, lstrip=True) for key, text in RENAMED.items()}},
    "older name of the length": VOCAB | config(max_len=64),
    "no mask": VOCAB | config(mask_token=None),
    "start and end tokens": VOCAB | config(bos_token="<dog>", eos_token="<cat>"),
    "token of another role": VOCAB | config(image_token="<cat>"),
    "additional tokens": VOCAB | config(additional_special_tokens=["<cat>", "</s>"]),
    "additional in the map": VOCAB | {MAP: {"additional_special_tokens": ["<dog>", "<cat>"]}},
    "extra in both": VOCAB | config(extra_special_tokens=["<cat>"]) | {MAP: {"extra_special_tokens": ["<dog>", "a"]}},
    "extra by role": VOCAB | config(extra_special_tokens={"cat_token": "<cat>"}),
    "added_tokens.json": VOCAB | {ADDED: {"<dog>": 51, "<cat>": 50}},
    "added and special": VOCAB | config(extra_special_tokens=["<cat>"]) | {ADDED: {"<dog>": 9, "<cat>": 8}},
    "decoder in the config": VOCAB | config(added_tokens_decoder={"51": CAT, "50": DOG, "4": MASK}),
    "decoder over older files": VOCAB | config(added_tokens_decoder={}) | {MAP: RENAMED, ADDED: {"<cat>": 50}},
    "tokenizer.json alone": json_form(),
    "tokenizer.json and config": json_form() | config(do_lower_case=False, model_max_length=512),
    "config over normalizer": CASED,
    "tokenizer.json over vocab.txt": json_form() | vocab_form(*VOCABULARY[::-1]),
    "names beside tokenizer.json": json_form() | {MAP: RENAMED},
    "model without type": json_form(model=TYPELESS),
    "length and padding baked in": json_form(truncation=TRUNCATION, padding=PADDING | {"pad_to_multiple_of": 8}),
    "added in tokenizer.json": json_form(added_tokens=[{"id": 4, **MASK}, {"id": 49, **CAT}, {"id": 50, **DOG}]),
    "two tokens of one id": json_form("model", vocab=INDEX | {"circle": 5}),
    "line ends of Windows": vocab_form(end="\r\n"),
    "blank lines and trailing space": vocab_form(*SPECIAL, "", "red \u3000\t", "", "a\x1c", "a", " e", ""),
    "a token twice": vocab_form(*SPECIAL, "red", "a", "red", "circle", "[MASK]", "##e"),
    "padding on the left": VOCAB | config(padding_side="left"),
    "cut on the left": VOCAB | config(truncation_side="left"),
    "both on the left": json_form() | config(padding_side="left", truncation_side="left", pad_token="<pad>"),
    "unknown entries": VOCAB | config(never_split=["red"], do_basic_tokenize=False, tokenizer_class="Y"),
}
LENGTH_OF = {"tokenizer.json and config": 512, "older name of the length": 64}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_transformers_ids(tmp_path, layout):
    folder, target = folder_of(tmp_path / "tokenizer", LAYOUTS[layout]), tmp_path / "tokenizer.json"
    assert write_tokenizer_json(folder, target) == LENGTH_OF.get(layout, 77)
    reference = BertTokenizer.from_pretrained(folder)
    for length in (9, 77):
        expected = reference(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
        np.testing.assert_array_equal(Tokenizer.from_file(target, length)(PROMPTS), expected)


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_folder_as_transformers_saves_it(tmp_path, do_lower_case):
    folder_of(tmp_path / "made", VOCAB)
    reference = BertTokenizer(str(tmp_path / "made/vocab.txt"), do_lower_case=do_lower_case, model_max_length=77)
    reference.add_tokens(["<cat>"])
    reference.save_pretrained(tmp_path / "saved")
    assert write_tokenizer_json(tmp_path / "saved", tmp_path / "tokenizer.json") == 77
    expected = reference(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
    np.testing.assert_array_equal(Tokenizer.from_file(tmp_path / "tokenizer.json", 77)(PROMPTS), expected)


def test_ids_by_hand(tmp_path):
    """Independently of transformers: what the options mean."""

    def ids(name, prompt, **entries):
        write_tokenizer_json(folder_of(tmp_path / name, VOCAB | config(**entries)), tmp_path / f"{name}.json")
        return Tokenizer.from_file(tmp_path / f"{name}.json", 6)([prompt])[0].tolist()

    def row(*words):
        return [INDEX[word] for word in words]

    assert ids("lower", "Red CAFÉ") == row("[CLS]", "red", "cafe", "[SEP]", "[PAD]", "[PAD]")
    assert ids("cased", "Red café", do_lower_case=False) == row("[CLS]", "Red", "café", "[SEP]", "[PAD]", "[PAD]")
    assert ids("accents", "Red CAFÉ", strip_accents=False) == row("[CLS]", "red", "café", "[SEP]", "[PAD]", "[PAD]")
    assert ids("cjk", "猫犬 a", tokenize_chinese_chars=False) == row("[CLS]", "猫犬", "a", "[SEP]", "[PAD]", "[PAD]")
    assert ids("renamed", "red ☃", **RENAMED) == row("<s>", "red", "<unk>", "</s>", "<pad>", "<pad>")


LENGTHS = [(77, 77), (512, 512), (1e30, 77), (10**30, 77), (None, 77), (True, 77), ("64", 77), (1, 77), (-5, 77)]


@pytest.mark.parametrize(("stated", "length"), LENGTHS)
def test_length_returned(tmp_path, stated, length):
    folder = folder_of(tmp_path / "tokenizer", VOCAB | config(model_max_length=stated))
    assert write_tokenizer_json(folder, tmp_path / "tokenizer.json") == length


def test_canonical_form(tmp_path):
    for i, layout in enumerate(("length and padding baked in", "names in the config")):
        write_tokenizer_json(folder_of(tmp_path / layout, LAYOUTS[layout]), tmp_path / f"{i}.json")
    plain, renamed = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert plain["truncation"] is plain["padding"] is renamed["truncation"] is None
    assert (renamed["padding"]["pad_token"], renamed["padding"]["strategy"]) == ("<pad>", "BatchLongest")
    assert plain["normalizer"] == json_form()["tokenizer.json"]["normalizer"]
    assert plain["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    assert plain["post_processor"]["type"] == "TemplateProcessing"
    assert list(plain["model"]["vocab"].items()) == [(text, i) for i, text in enumerate(VOCABULARY)]
    assert [entry["content"] for entry in plain["added_tokens"]] == SPECIAL


@pytest.mark.parametrize("layout", ["vocab.txt alone", "added and special", "two tokens of one id", "a token twice"])
def test_equal_folders_give_equal_bytes(tmp_path, layout):
    same = ["vocab.txt alone", "tokenizer.json alone", "line ends of Windows", "model without type"]
    for i, name in enumerate([layout] * 8 + same * (layout in same)):
        write_tokenizer_json(folder_of(tmp_path / f"{i}", LAYOUTS[name]), tmp_path / f"{i}.json")
    assert len({path.read_bytes() for path in tmp_path.glob("*.json")}) == 1


@pytest.mark.parametrize("lower", [True, False])
def test_overruled_normalizer_is_warned_of(tmp_path, caplog, lower):
    keys = ["lowercase", "strip_accents"] if lower else []
    with caplog.at_level(logging.WARNING):
        write_tokenizer_json(folder_of(tmp_path / "tokenizer", CASED | config(do_lower_case=lower)), tmp_path / "out")
    assert [record.args[1:] for record in caplog.records] == [(k, False, "tokenizer_config.json", True) for k in keys]


HOLES = vocab_form(*SPECIAL[:3], "red", "red", "red", "red", "[SEP]", "[MASK]")
REFUSED = {
    "empty folder": ({}, r"neither tokenizer\.json nor vocab\.txt"),
    "tokenizer.json cut off": (VOCAB | {"tokenizer.json": '{"model": '}, r"tokenizer\.json: .*JSONDecodeError"),
    "tokenizer.json too deep": ({"tokenizer.json": "[" * 100_000}, r"tokenizer\.json: .*RecursionError"),
    "tokenizer.json a list": ({"tokenizer.json": []}, r"tokenizer\.json: .*list, expected an object"),
    "tokenizer.json not UTF-8": ({"tokenizer.json": b'{"\xff"}'}, r"tokenizer\.json: .*utf-8"),
    "config cut off": (VOCAB | {"tokenizer_config.json": "{"}, r"tokenizer_config\.json: .*JSONDecodeError"),
    "vocab.txt not UTF-8": ({"vocab.txt": b"[PAD]\n\xe9t\xe9\n"}, r"vocab\.txt: .*utf-8"),
    "vocab.txt empty": ({"vocab.txt": ""}, r"vocab\.txt: the vocabulary is empty"),
    "no special tokens": (vocab_form(*WORDS), r"vocab\.txt: not in the vocabulary: unk_token '\[UNK\]', sep_token"),
    "no [PAD]": (vocab_form(*VOCABULARY[1:]), r"vocab\.txt: not in the vocabulary: pad_token '\[PAD\]';"),
    "no [MASK]": (vocab_form(*SPECIAL[:4], *WORDS), r"mask_token '\[MASK\]'; .* mask_token may be null"),
    "byte order mark": (vocab_form("\ufeff[PAD]", *VOCABULARY[1:]), r"pad_token '\[PAD\]'"),
    "name not in the vocabulary": (VOCAB | config(cls_token="<cls>"), r"vocab\.txt: .*cls_token '<cls>'"),
    "null name": (VOCAB | config(pad_token=None), r"vocab\.txt: .*pad_token None"),
    "name of a wrong type": (VOCAB | config(sep_token=3), r"tokenizer_config\.json: .*got the token 3"),
    "flag of a wrong type": (VOCAB | config(do_lower_case="yes"), r"tokenizer_config\.json: .*TypeError"),
    "padding on no side": (VOCAB | config(padding_side="top"), r"tokenizer_config\.json: padding_side is 'top'"),
    "cut on no side": (VOCAB | config(truncation_side=3), r"tokenizer_config\.json: truncation_side is 3"),
    "extra of a wrong type": (VOCAB | {MAP: {"extra_special_tokens": 7}}, r"_config\.json: .*TypeError"),
    "special tokens as text": (VOCAB | config(split_special_tokens=True), "split_special_tokens"),
    "padding of a wrong type": (json_form(padding=[1]), r"tokenizer\.json: .*AttributeError"),
    "decoder of a wrong type": (VOCAB | config(added_tokens_decoder=[1]), r"tokenizer_config\.json: .*AttributeError"),
    "decoder without ids": (VOCAB | config(added_tokens_decoder={"x": {}}), r"tokenizer_config\.json: .*ValueError"),
    "flag of an added token": (VOCAB | config(mask_token=MASK | {"lstrip": 7}), r"tokenizer_config\.json: .*TypeError"),
    "added tokens without content": (json_form(added_tokens=[7]), r"tokenizer\.json: .*TypeError"),
    "added token without an id": (VOCAB | {ADDED: {"<cat>": "x"}}, r"added_tokens\.json: .*ValueError"),
    "added tokens in holes": (HOLES | config(bos_token="x", eos_token="y", image_token="z"), "cannot keep their ids"),
    "BPE": (json_form("model", type="BPE"), "model is 'BPE', expected WordPiece"),
    "no model": (json_form(model=None), "model is None, expected WordPiece"),
    "other normalizer": (json_form("normalizer", type="NFKC"), "normalizer is 'NFKC'"),
    "other words": (json_form("pre_tokenizer", type="Metaspace"), "pre_tokenizer is 'Metaspace'"),
    "other prefix": (json_form("model", continuing_subword_prefix="@@"), "prefix '@@'"),
    "vocab a list": (json_form("model", vocab=VOCABULARY), "a vocab object"),
    "negative id": (json_form("model", vocab={"a": -1}), "token 'a' has id -1"),
    "huge id": (json_form("model", vocab={"a": 2**32 - 1}), "token 'a' has id 4294967295"),
    "lone surrogate": (json_form("model", vocab=INDEX | {"\ud800": 98}), r"tokenizer\.json: not usable"),
    "name with a space": (vocab_form(*VOCABULARY, "a b") | config(cls_token="a b"), r"vocab\.txt: not usable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    files, message = REFUSED[case]
    folder = folder_of(tmp_path / "tokenizer", files)
    with pytest.raises(CheckpointError, match=message) as refusal:
        write_tokenizer_json(folder, tmp_path / "tokenizer.json")
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "tokenizer.json").exists()


def test_refused_paths(tmp_path):
    with pytest.raises(CheckpointError, match="absent: neither"):
        write_tokenizer_json(tmp_path / "absent", tmp_path / "tokenizer.json")
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    os.mkfifo(folder_of(tmp_path / "pipe", {}) / "vocab.txt")
    for path in (tmp_path / "folder" / "tokenizer.json", tmp_path / "pipe" / "vocab.txt"):
        with pytest.raises(CheckpointError, match=f"{path}: not a regular file"):
            write_tokenizer_json(path.parent, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_refused_size(tmp_path, monkeypatch, name):
    folder = folder_of(tmp_path / "tokenizer", VOCAB | {name: " " * 2000})
    monkeypatch.setattr(tokenizer_files, "MAX_BYTES", 1999)
    with pytest.raises(CheckpointError, match=rf"{name}: more than 1999 bytes"):
        write_tokenizer_json(folder, tmp_path / "tokenizer.json")
