"""Tokenizer: the token ids of transformers' BertTokenizer and CLIPTokenizer, computed by the package tokenizers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ldm_runtime.conditioning.tokenizer_form import pad_token
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.number_checks import integer
from ldm_runtime.regular_files import read_regular

__all__ = ["MAX_BYTES", "MAX_CHARACTERS", "MAX_LENGTH", "Tokenizer"]

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20
"""Maximum size of a tokenizer.json in bytes; the largest published ones are under 10 MiB."""

MAX_CHARACTERS = 50_000
"""Maximum length of a prompt. 77 tokens are about 400 characters of prose; the model does not read later tokens."""

MAX_LENGTH = 2**16
"""Maximum number of tokens per prompt. The minimum is 2, the first and the last token."""


class Tokenizer:
    """Converts prompts to ids [N, length], like transformers with ``padding="max_length", truncation=True``.

    The file decides how text is cleaned, lower-cased and split: BERT's WordPiece (Devlin et al. 2019) or CLIP's
    byte-level BPE (Radford et al. 2021). Special tokens typed in a prompt are recognised, as in transformers. Threads
    may share a tokenizer.
    """

    def __init__(
        self,
        fast: tokenizers.Tokenizer,
        length: int,
        pad_token: str,
        padding_side: str = "right",
        truncation_side: str = "right",
    ) -> None:
        pad_id: Any = fast.token_to_id(pad_token)
        self._text = fast.to_str()
        fast.enable_truncation(length, direction=truncation_side)
        fast.enable_padding(direction=padding_side, length=length, pad_id=pad_id, pad_token=pad_token)
        self._fast = fast
        added = {token.content: index for index, token in fast.get_added_tokens_decoder().items()}
        self._vectors = {token: _vectors(token, added) for token in added if f"{token}_1" in added}
        self.length, self.pad_id = length, int(pad_id)

    @classmethod
    def from_file(cls, path: str | Path, length: int) -> Tokenizer:
        """Read a bundle's ``tokenizer.json``; ``length`` is the number of tokens the text encoder takes.

        The file's padding section names the padding token, otherwise it is [PAD]. Its padding and truncation sections
        name the directions, otherwise they are right.

        Raises:
            SpecError: ``length`` is not an integer from 2 to MAX_LENGTH.
            ManifestError: The file is missing, damaged, or not a tokenizer as ``ldm-export build`` writes it.
        """
        length = integer("tokenizer: length", length, 2, MAX_LENGTH)
        path = Path(path)
        if not path.is_file():
            raise ManifestError(f"{path}: no such file, expected the bundle's tokenizer; rebuild the bundle")
        if path.stat().st_size > MAX_BYTES:
            raise ManifestError(
                f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}; rebuild the bundle"
            )
        try:
            text = read_regular(path, MAX_BYTES, ManifestError).decode()
            document = json.loads(text)
            pad = pad_token(document)
            sides = [_side(document, section) for section in ("padding", "truncation")] if pad else []
            fast = tokenizers.Tokenizer.from_str(text) if pad else None
        except Exception as error:  # tokenizers raises no narrower class
            cause = " ".join(str(error).split())
            raise ManifestError(f"{path}: not a tokenizer ({cause:.200}); rebuild the bundle") from None
        if pad is None or fast is None:
            raise ManifestError(
                f"{path}: not a tokenizer of BERT or CLIP as `ldm-export build` writes it (WordPiece or byte-level "
                "BPE, special tokens in the vocabulary, one before and one after a prompt); rebuild the bundle"
            )
        return cls(fast, length, pad, *sides)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Ids int64 [N, length]: first token, tokens of the prompt, last token and padding; longer prompts are cut off.

        A warning is logged for a prompt that is cut off. The empty prompt is that of the unconditional branch.

        Raises:
            SpecError: ``prompts`` is not a sequence, or a prompt is not a text, has more than MAX_CHARACTERS
                characters, or contains a lone surrogate, so that it is not Unicode text.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise SpecError(f"prompts: got one {type(prompts).__name__}, expected a list of texts; put it into a list")
        for i, prompt in enumerate(prompts):
            _check_prompt(f"prompt {i}", prompt)
        if self._vectors:
            return np.array([self._spelled_out(prompt) for prompt in prompts], np.int64).reshape(-1, self.length)
        encodings = [self._fast.encode(prompt) for prompt in prompts]
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                self._warn(prompt, encoding)
        return np.array([encoding.ids for encoding in encodings], dtype=np.int64).reshape(len(prompts), self.length)

    @cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        """The tokenizer without truncation and padding."""
        whole = tokenizers.Tokenizer.from_str(self._text)
        whole.no_truncation()
        whole.no_padding()
        return whole

    @property
    def ends(self) -> tuple[int, int]:
        """Ids of the first and the last token of every prompt."""
        first, last = self._whole.encode("").ids
        return first, last

    def ids(self, text: str) -> list[int]:
        """Ids of all tokens of a text, without the first, the last and padding.

        A textual inversion token with several vectors becomes several ids. As in diffusers, it is only recognised in
        the case in which it was added.

        Raises:
            SpecError: As ``__call__``.
        """
        _check_prompt("prompt", text)
        encoding = self._whole.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [one for index, (start, end) in spans for one in self._vectors.get(text[start:end], (index,))]

    def _spelled_out(self, prompt: str) -> list[int]:
        """Ids [length] of a prompt, with all ids of tokens that have several vectors."""
        (first, last), ids, room = self.ends, self.ids(prompt), self.length - 2
        if len(ids) > room:
            log.warning("prompt: only %d of its %d tokens are used; shorten it", room, len(ids))
        return [first, *ids[:room], last, *[self.pad_id] * (room - len(ids))]

    def token(self, token_id: int) -> str:
        """The token with an id; a CLIP token that ends a word has the suffix ``</w>``."""
        return str(self._whole.id_to_token(token_id))

    def _warn(self, prompt: str, encoding: Any) -> None:
        spans = [(start, end) for start, end in encoding.offsets if end > start]
        read = max((end for _, end in spans), default=0) - min((start for start, _ in spans), default=0)
        log.warning(
            "prompt: only %d of its %d characters are used, because the model takes %d tokens; shorten it",
            read,
            len(prompt),
            self.length,
        )


def _vectors(token: str, added: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of ``token``, ``token_1``, …: the vectors of one textual inversion token."""
    names = (f"{token}_{number}" for number in count(1))
    return added[token], *(added[name] for name in takewhile(added.__contains__, names))


def _check_prompt(where: str, prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise SpecError(f"{where}: got {type(prompt).__name__}, expected a text")
    if len(prompt) > MAX_CHARACTERS:
        raise SpecError(f"{where}: got {len(prompt)} characters, expected at most {MAX_CHARACTERS}; shorten it")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{where}: character {error.start} is the lone surrogate U+{ord(prompt[error.start]):04X}, "
            "expected Unicode text; decode the prompt's bytes as UTF-8"
        ) from None


def _side(document: dict[str, Any], section: str) -> str:
    """The side that the padding or truncation section of tokenizer.json names; right without one.

    Raises:
        ValueError: It names none.
    """
    direction = (document.get(section) or {}).get("direction", "Right")
    if direction not in ("Left", "Right"):
        raise ValueError(f"{section}: got direction {direction!r:.40}, expected Left or Right")
    return str(direction).lower()
