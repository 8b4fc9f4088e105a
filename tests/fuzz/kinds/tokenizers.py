"""Tokenizers: the files of a checkpoint's tokenizer, and the tokenizer of a bundle with the texts of prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from transformers import BertTokenizer

from ldm_export.checkpoint.tokenizer_files import write_tokenizer_json
from ldm_runtime.conditioning.tokenizer import Tokenizer
from tests.fuzz.mutation import TEXTS, changed_bytes, changed_document
from tests.fuzz.outcome import Attempt
from tests.support.checkpoints import VOCABULARY

__all__ = ["prepare"]

PROMPTS = ("a red circle", "", "[CLS] a [SEP]", "é🙂 中文", "a" * 500, *TEXTS)


def prepare(folder: Path) -> Attempt:
    """Write a checkpoint's tokenizer and a bundle's; an input changes one file of one of them."""
    published = folder / "published"
    published.mkdir(parents=True)
    (published / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizer(str(published / "vocab.txt"), model_max_length=77).save_pretrained(published)
    write_tokenizer_json(published, folder / "valid.json")
    texts = {path: path.read_bytes() for path in sorted(published.iterdir())}
    files = [*texts, folder / "valid.json"]
    texts[folder / "valid.json"] = (folder / "valid.json").read_bytes()
    documents = {path: json.loads(text) for path, text in texts.items() if path.suffix == ".json"}

    def attempt(random: Random) -> None:
        file = random.choice(files)
        if file.suffix != ".json" or random.random() < 0.3:
            content = changed_bytes(random, texts[file])
        else:
            content = json.dumps(changed_document(random, documents[file])).encode()
        work = folder / "work"
        target = folder / "changed.json"
        if file.parent == published:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(published, work)
            (work / file.name).write_bytes(content)
            write_tokenizer_json(work, target)
        else:
            target.write_bytes(content)
        Tokenizer.from_file(target, random.choice((2, 16, 77)))([random.choice(PROMPTS), random.choice(PROMPTS)])

    return attempt
