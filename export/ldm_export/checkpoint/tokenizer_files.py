"""Converts the BERT tokenizer folder of a checkpoint, in any published form, to the ``tokenizer.json`` of a bundle.

The files are interpreted as by ``BertTokenizer.from_pretrained`` of transformers 5. The vocabulary comes from
tokenizer.json, else vocab.txt; the normalization only from tokenizer_config.json (lower case by default). Special and
added tokens come from tokenizer_config.json if it has ``added_tokens_decoder``, else also from special_tokens_map.json,
added_tokens.json and tokenizer.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from ldm_runtime.conditioning.tokenizer import MAX_BYTES, MAX_LENGTH
from ldm_runtime.errors import CheckpointError

__all__ = ["MAX_TOKENS", "write_tokenizer_json"]

log = logging.getLogger(__name__)

DEFAULT_LENGTH = 77
MAX_TOKENS = 2**20
"""Upper bound of token ids; the largest published BERT vocabulary has half a million."""

_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROLES = ("bos_token", "eos_token", *_SPECIAL)  # in the order in which transformers adds and numbers them
_BERT = {"model": "WordPiece", "normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONFIG = "tokenizer_config.json"


def write_tokenizer_json(folder: Path, target: Path) -> int:
    """Write the tokenizer to ``target`` and return its ``model_max_length``, or 77 if that is unset or out of range.

    The file is a BertNormalizer, a BertPreTokenizer, a WordPiece model and a [CLS] … [SEP] template, in the format of
    the ``tokenizers`` library; equal folders give equal bytes. It has a padding section only if the padding token is
    not [PAD] or the side is left, and a truncation section only if the side is left. Their lengths have no meaning,
    because the reader sets them. A token that occurs twice in vocab.txt has the id of its last line.

    Raises:
        CheckpointError: A file is missing, larger than 64 MiB, not UTF-8 or not JSON; the vocabulary is missing or
            empty or lacks a special token; an entry has a wrong type; or the tokenizer is not BERT's. The message names
            the file.
    """
    published = _read_json(folder / "tokenizer.json")
    if published is not None:
        source = folder / "tokenizer.json"
        vocabulary = _bert_vocabulary(source, published)
    elif (source := folder / "vocab.txt").exists():
        _read(source)
        with _errors_of(source):
            vocabulary = WordPiece.read_file(str(source))
    else:
        raise CheckpointError(f"{folder}: neither tokenizer.json nor vocab.txt; expected a BERT tokenizer's folder")
    config, added = _settings(folder, published or {})
    sides = _sides(folder, config, published or {})
    special = _special_tokens(source, vocabulary, config)
    with _errors_of(folder / _CONFIG):
        normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )
        tokens = _added_tokens(config, added)
    with _errors_of(source):
        text = _to_json(vocabulary, normalizer, tokens, special, sides)
        content = text.encode()
        if published is not None:
            _compare(source, published["normalizer"], json.loads(text)["normalizer"])
    target.write_bytes(content)
    length = config.get("model_max_length", config.get("max_len"))
    return length if type(length) is int and 2 <= length <= MAX_LENGTH else DEFAULT_LENGTH


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Convert any error that a damaged file or entry causes into a CheckpointError of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
        raise CheckpointError(f"{path}: not usable for a BERT tokenizer ({cause}); download it again") from None


def _read(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; download the checkpoint again")
    with _errors_of(path), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_BYTES} bytes, too large for a tokenizer; download it again")
        return content.decode()


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object of a file; None if the file does not exist."""
    if not path.exists():
        return None
    with _errors_of(path):
        value = json.loads(_read(path))
        if not isinstance(value, dict):
            raise TypeError(f"got a JSON {type(value).__name__}, expected an object")
        return value


def _bert_vocabulary(path: Path, published: dict[str, Any]) -> dict[str, int]:
    parts = {name: part if isinstance(part := published.get(name), dict) else {} for name in _BERT}
    model = parts["model"]
    if "type" not in model and "max_input_chars_per_word" in model:  # the first releases wrote no type
        model["type"] = "WordPiece"
    for name, kind in _BERT.items():
        if parts[name].get("type") != kind:
            raise CheckpointError(
                f"{path}: {name} is {parts[name].get('type')!r:.40}, expected {kind}; only BERT's are supported"
            )
    prefix, vocabulary = model.get("continuing_subword_prefix", "##"), model.get("vocab")
    if prefix != "##" or not isinstance(vocabulary, dict):
        raise CheckpointError(f"{path}: expected BERT's prefix '##' and a vocab object, got prefix {prefix!r:.20}")
    return vocabulary


def _settings(folder: Path, published: dict[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Merge BertTokenizer's arguments and the added tokens by id from the folder's files, as transformers does."""
    config = _read_json(folder / _CONFIG) or {}
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    if "added_tokens_decoder" in config:
        with _errors_of(folder / _CONFIG):
            return config, {int(index): dict(token) for index, token in config["added_tokens_decoder"].items()}
    with _errors_of(folder / "special_tokens_map.json"):
        for key, value in (_read_json(folder / "special_tokens_map.json") or {}).items():
            joined = key == "extra_special_tokens" and isinstance(value, list)
            config[key] = [*(config.get(key) or []), *value] if joined else value
    if "additional_special_tokens" in config:
        config.setdefault("extra_special_tokens", config["additional_special_tokens"])
    added = {}
    with _errors_of(folder / _CONFIG):
        content_of_roles = [
            _content(token) for token in (*map(config.get, _ROLES), *(config.get("extra_special_tokens") or ()))
        ]
    with _errors_of(folder / "added_tokens.json"):
        for content, index in (_read_json(folder / "added_tokens.json") or {}).items():
            added[int(index)] = {
                "content": content,
                "normalized": content not in content_of_roles,
                "special": content in content_of_roles,
            }
    with _errors_of(folder / "tokenizer.json"):
        added.update({int(token["id"]): dict(token) for token in published.get("added_tokens") or []})
    return config, added


def _sides(folder: Path, config: dict[str, Any], published: dict[str, Any]) -> tuple[str, str]:
    """Return the sides of padding and truncation. Refuse tokenizers that treat typed special tokens as plain text."""
    sides = []
    for key, section in (("padding_side", "padding"), ("truncation_side", "truncation")):
        with _errors_of(folder / "tokenizer.json"):
            side = config.get(key, (published.get(section) or {}).get("direction", "right").lower())
        if side not in ("left", "right"):
            raise CheckpointError(f"{folder / _CONFIG}: {key} is {side!r:.40}, expected 'left' or 'right'")
        sides.append(side)
    if config.get("split_special_tokens", False) is not False:
        raise CheckpointError(f"{folder / _CONFIG}: split_special_tokens is set, only false is supported")
    return sides[0], sides[1]


def _content(token: Any) -> str | None:
    """Return the text of a token that is a string, the fields of an AddedToken, or null."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise TypeError(f"got the token {token!r:.60}, expected a text or an object with a content")
    return text


def _special_tokens(source: Path, vocabulary: dict[str, int], config: dict[str, Any]) -> dict[str, str]:
    """Check the vocabulary and return role -> text of the special tokens, which it must contain."""
    if not vocabulary:
        raise CheckpointError(f"{source}: the vocabulary is empty; download the checkpoint again")
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < MAX_TOKENS:
            raise CheckpointError(f"{source}: token {token!r:.40} has id {index!r:.40}, expected 0 to {MAX_TOKENS - 1}")
    with _errors_of(source.with_name(_CONFIG)):
        special = {key: _content(config.get(key, default)) for key, default in _SPECIAL.items()}
    if special["mask_token"] is None:
        del special["mask_token"]  # nothing here needs a mask
    missing = [f"{key} {text!r:.40}" for key, text in special.items() if text not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{source}: not in the vocabulary: {', '.join(missing)}; name the special tokens as in {_CONFIG}, "
            "mask_token may be null there"
        )
    return {key: str(text) for key, text in special.items()}


def _added_tokens(config: dict[str, Any], added: dict[int, dict[str, Any]]) -> list[AddedToken]:
    """Return the tokens that are matched before a prompt is split, in the order that determines the ids of new ones."""
    special_tokens = [config.get(key, _SPECIAL.get(key)) for key in _ROLES]
    special_tokens += [
        v for k, v in config.items() if k.endswith("_token") and k not in _ROLES and isinstance(v, str | dict)
    ]
    extra = config.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        special_tokens, extra = [*special_tokens, *extra.values()], []
    names = {_content(token) for token in special_tokens}
    tokens: dict[str, AddedToken] = {}
    for token in (*(added[index] for index in sorted(added)), *special_tokens, *extra):
        text = _content(token)
        if text is None or text in tokens:
            continue
        fields = {"special": True} if isinstance(token, str) else token
        tokens[text] = AddedToken(text, **{flag: fields[flag] for flag in _FLAGS if flag in fields})
        if text in names:
            tokens[text].special = True
    return list(tokens.values())


def _to_json(
    vocabulary: dict[str, int],
    normalizer: Any,
    tokens: list[AddedToken],
    special: dict[str, str],
    sides: tuple[str, str],
) -> str:
    fast = Tokenizer(WordPiece(vocabulary, unk_token=special["unk_token"]))
    fast.normalizer, fast.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##")
    fast.add_tokens(tokens)
    first, last, pad = special["cls_token"], special["sep_token"], special["pad_token"]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(token, fast.token_to_id(token)) for token in (first, last)],
    )
    padding_side, truncation_side = sides
    if pad != "[PAD]" or padding_side != "right":
        fast.enable_padding(direction=padding_side, pad_id=fast.token_to_id(pad), pad_token=pad)
    if truncation_side != "right":
        fast.enable_truncation(DEFAULT_LENGTH, direction=truncation_side)
    document = json.loads(fast.to_str())
    document["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if Tokenizer.from_str(text).get_added_tokens_decoder() != fast.get_added_tokens_decoder():
        raise ValueError("the added tokens cannot keep their ids")
    return text


def _compare(path: Path, stated: dict[str, Any], actual: dict[str, Any]) -> None:
    """Warn if the normalizer in tokenizer.json differs from tokenizer_config.json, which transformers uses."""
    for key in ("lowercase", "strip_accents", "handle_chinese_chars"):
        default = "lowercase" if key == "strip_accents" else key
        theirs, mine = (n.get(default) if n.get(key) is None else n[key] for n in (stated, actual))
        if theirs != mine:
            log.warning(
                "%s: the normalizer has %s %s; by %s it is %s, and so in the bundle", path, key, theirs, _CONFIG, mine
            )
