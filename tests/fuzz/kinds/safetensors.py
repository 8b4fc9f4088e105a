"""Weight files in the format safetensors, whole and in shards: listed, and every tensor read."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random

import torch

from ldm_export.checkpoint.weights import read_weights
from tests.fuzz.mutation import changed_bytes, changed_document
from tests.fuzz.outcome import Attempt
from tests.support.checkpoints import write_weights

__all__ = ["STATE", "prepare"]

STATE = {
    "conv.weight": torch.linspace(-2, 2, 24).reshape(2, 3, 2, 2),
    "conv.bias": torch.tensor([0.5, -1.0]).half(),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
}


def prepare(folder: Path) -> Attempt:
    """Write a whole file, and shards with their index; an input changes the header, the index or any bytes."""
    for name, shards in (("whole", 1), ("shards", 2)):
        (folder / name).mkdir(parents=True)
        write_weights(folder / name, STATE, format="safetensors", shards=shards)

    def attempt(random: Random) -> None:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / random.choice(("whole", "shards")), work)
        file = random.choice(sorted(work.iterdir()))
        content = file.read_bytes()
        if file.suffix == ".json" and random.random() < 0.8:
            file.write_text(json.dumps(changed_document(random, json.loads(content))))
        elif file.suffix == ".safetensors" and random.random() < 0.6:
            file.write_bytes(_with_header(random, content))
        else:
            file.write_bytes(changed_bytes(random, content))
        for tensor in read_weights(work, "unet").values():
            tensor.read()

    return attempt


def _with_header(random: Random, content: bytes) -> bytes:
    """Change the JSON header; its length is usually made to fit."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(changed_document(random, json.loads(content[8 : 8 + length]))).encode()
    size = len(header) if random.random() < 0.9 else random.choice((0, 2**63, 2**64 - 1, len(header) - 1))
    return struct.pack("<Q", size) + header + content[8 + length :]
