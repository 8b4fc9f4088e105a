"""Weight files in pickle form: state dicts of diffusers, checkpoints of CompVis, in archives and in the older form."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from random import Random

import torch

from ldm_export.checkpoint.weights import read_weights
from ldm_export.originals.checkpoint_file import read_state_dict
from tests.fuzz.kinds.safetensors import STATE
from tests.fuzz.mutation import changed_bytes
from tests.fuzz.outcome import Attempt

__all__ = ["prepare"]


def prepare(folder: Path) -> Attempt:
    """Save a state dict in both forms; an input changes the pickle, another entry, or any bytes of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {"state_dict": STATE, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(3)}}]}
    valid = [
        _saved(content, archive) for content in (STATE, checkpoint) for archive in (True, False)
    ]  # state dict, its older form, checkpoint, its older form

    def attempt(random: Random) -> None:
        which = random.randrange(4)
        changed = _in_archive(random, valid[which]) if which % 2 == 0 and random.random() < 0.7 else None
        content = changed_bytes(random, valid[which]) if changed is None else changed
        if which < 2:
            (folder / "pytorch_model.bin").write_bytes(content)
            tensors = read_weights(folder, "unet")
        else:
            (folder / "model.ckpt").write_bytes(content)
            tensors = dict(read_state_dict(folder / "model.ckpt"))
        for tensor in tensors.values():
            tensor.read()

    return attempt


def _saved(content: object, archive: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def _in_archive(random: Random, content: bytes) -> bytes:
    """Change one entry of an archive and write the archive again, so that its checksums fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        chosen = random.choice(pickles if random.random() < 0.8 else names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                data = changed_bytes(random, data)
            method = zipfile.ZIP_DEFLATED if random.random() < 0.02 else zipfile.ZIP_STORED
            if name != chosen or random.random() < 0.97:
                new.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()
