"""Configs of checkpoint folders: opened, and sometimes built as modules and a scheduler; no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from ldm_runtime.schedulers import scheduler_from_config
from tests.fuzz.mutation import changed_bytes, changed_document
from tests.fuzz.outcome import Attempt
from tests.support.configs_only import write_configs

__all__ = ["prepare"]

MODULES = 0.1
"""Share of the inputs that are built as a module, which takes longer."""


def prepare(folder: Path) -> Attempt:
    """Write a checkpoint without weights; an input is the folder with one of its JSON files changed."""
    checkpoint = write_configs(folder / "checkpoint")
    files = sorted(path for path in checkpoint.rglob("*.json") if path.parent.name != "tokenizer")
    texts = {path: path.read_bytes() for path in files}
    documents = {path: json.loads(text) for path, text in texts.items()}

    def attempt(random: Random) -> None:
        file = random.choice(files)
        content = (
            changed_bytes(random, texts[file])
            if random.random() < 0.1
            else json.dumps(changed_document(random, documents[file])).encode()
        )
        file.write_bytes(content)
        try:
            opened = open_checkpoint(checkpoint, random_weights=True)
            scheduler_from_config(opened.scheduler_config).trajectory(4)
            part = file.parent.name
            if part in opened.components and random.random() < MODULES:
                load_module(opened, part)
        finally:
            file.write_bytes(texts[file])

    return attempt
