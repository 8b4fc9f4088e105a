"""Adds LoRA adapters to an existing bundle and removes them; graphs stay as they are."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ldm_export.lora import Adapter
from ldm_runtime.atomic_files import written_beside
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import LORAS, MANIFEST, lora_file
from ldm_runtime.errors import BuildError
from ldm_runtime.loras.adapter_file import MAX_ADAPTER_BYTES
from ldm_runtime.manifest import FileFact, LoraFact, Manifest
from ldm_runtime.manifest_reader import MAX_LORAS

__all__ = ["change_loras"]


def change_loras(folder: Path, added: Mapping[str, tuple[Adapter, str]], removed: Sequence[str] = ()) -> Bundle:
    """Write adapters into a bundle, in place of those of the same names, and remove others.

    Files of adapters have the digest in their names: the new ones are written first, then the manifest is replaced, and
    then the files that it no longer lists are removed. A reader sees the old adapters or the new ones.

    Args:
        folder: The bundle.
        added: Name -> adapter, and name of its source.
        removed: Names of adapters to remove.

    Raises:
        ManifestError: The folder is not a bundle.
        BuildError: An adapter to remove is not there, there are too many or too large ones, or the bundle cannot be
            written.
    """
    folder = folder.resolve()
    with _locked(folder):
        manifest = Bundle.open(folder).manifest
        for name in removed:
            if name not in manifest.loras:
                known = ", ".join(manifest.loras) or "none"
                raise BuildError(f"{folder}: has no adapter {name!r:.80}; it has {known}")
        changed, contents = _changed(manifest, added, removed)
        if len(changed.loras) > MAX_LORAS:
            raise BuildError(f"{folder}: got {len(changed.loras)} adapters, expected at most {MAX_LORAS}; remove some")
        files = {folder / name: content for name, content in contents.items()}
        try:
            with written_beside({**files, folder / MANIFEST: changed.to_json().encode()}) as parts:
                for path, part in parts.items():  # the manifest is the last
                    part.replace(path)
        except OSError as error:
            raise BuildError(f"{folder}: cannot be written ({error.strerror}); free some disk space") from None
        _remove_unlisted(folder, changed)
    return Bundle.open(folder)


def _changed(
    manifest: Manifest, added: Mapping[str, tuple[Adapter, str]], removed: Sequence[str]
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest with the changes, and the new files."""
    gone = {*added, *removed}
    loras = {name: lora for name, lora in manifest.loras.items() if name not in gone}
    listed = {lora.file for lora in manifest.loras.values()} - {lora.file for lora in loras.values()}
    files = {name: fact for name, fact in manifest.files.items() if name not in listed}
    contents: dict[str, bytes] = {}
    for name, (adapter, source) in added.items():
        if len(adapter.content) > MAX_ADAPTER_BYTES:
            size = f"{len(adapter.content)} bytes, expected at most {MAX_ADAPTER_BYTES}"
            raise BuildError(f"{source}: got an adapter of {size}; merge it with `ldm-export build --lora`")
        digest = hashlib.sha256(adapter.content).hexdigest()
        file = lora_file(name, digest)
        loras[name], files[file] = LoraFact(file, adapter.layers, source), FileFact(digest, len(adapter.content))
        contents[file] = adapter.content
    return replace(manifest, loras=loras, files=files), contents


def _remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Remove files of adapters that the manifest does not list, also those of a call that was killed."""
    with suppress(OSError):
        for path in (folder / LORAS).iterdir():
            if f"{LORAS}/{path.name}" not in manifest.files:
                path.unlink()
        (folder / LORAS).rmdir()  # fails while it has files


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing adapters meanwhile; on a file system without locks, nothing is locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # not a bundle: its reader reports that
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
