"""Copies of a graph's files with changed weights, which an engine maps as it maps the files of a bundle.

An engine that gets changed weights as arrays keeps these beside its own, repacked ones. Pages of a file leave memory
instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from ldm_runtime.errors import BackendError
from ldm_runtime.loras.changes import ChangedWeight
from ldm_runtime.onnx_external import external_locations

__all__ = ["changed_files"]

CHUNK = 4 * 2**20


@contextmanager
def changed_files(graph: Path, changes: Sequence[ChangedWeight]) -> Iterator[Path]:
    """Write a graph and its external weights with the changes to a temporary folder, one weight at a time.

    Args:
        graph: An ONNX file of a bundle; its external weights lie beside it.
        changes: Weights that get other values; without any, nothing is written.

    Yields:
        The graph for an engine to load. The copy is removed at the end; an engine that has mapped it keeps it until it
        is closed.

    Raises:
        BackendError: The temporary folder has no room.
        ManifestError: The file of an adapter was written meanwhile.
    """
    if not changes:
        yield graph
        return
    files = [graph.parent / location for location in (graph.name, *sorted(external_locations(graph)))]
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="ldm-loras-", ignore_cleanup_errors=True)))
            for file in files:
                target = folder / file.relative_to(graph.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open("rb") as old, target.open("wb") as new:
                    _copy(old, new, [one for one in changes if one.stored.file == file])
        except OSError as error:
            size = sum(file.stat().st_size for file in files) / 1e9
            raise BackendError(
                f"{graph}: cannot write a copy with the weights of LoRA adapters: {error.strerror}; it takes "
                f"{size:.1f} GB, set TMPDIR to a folder with room"
            ) from None
        yield folder / graph.name


def _copy(old: BinaryIO, new: BinaryIO, changes: Sequence[ChangedWeight]) -> None:
    for one in sorted(changes, key=lambda change: change.stored.offset):
        _copy_bytes(old, new, one.stored.offset - old.tell())
        new.write(one.values().data)
        old.seek(one.stored.nbytes, 1)
    while part := old.read(CHUNK):
        new.write(part)


def _copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count > 0 and (part := old.read(min(CHUNK, count))):
        new.write(part)
        count -= len(part)
