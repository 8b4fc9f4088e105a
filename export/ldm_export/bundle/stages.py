"""Stages of a build. A stage has a key of everything it depends on; while the key is the same, its files are reused."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_export.bundle.publish import remove
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.backends.page_release import release_freed_memory
from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import require_map, require_object
from ldm_runtime.manifest import FileFact
from ldm_runtime.manifest_reader import MAX_BYTES, file_fact, safe_path
from ldm_runtime.regular_files import read_regular

__all__ = ["OnProgress", "Outcome", "Stage", "link_files", "run_stage"]

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of its finished steps, and the number of its steps. A stage starts with 0
finished steps and ends with all of them; a stage without steps has one.
"""

LARGE = 64 * 2**20
"""Bytes of a stage's files above which the garbage collector runs after it, which takes up to a second."""


@dataclass(frozen=True)
class Stage:
    """A part of a build.

    Attributes:
        name: Its name in the manifest.
        depends: Everything its result depends on, as JSON values: input digests, parameters, tool versions.
        run: Writes files to a folder and returns their relative paths.
    """

    name: str
    depends: Mapping[str, Any]
    run: Callable[[Path], list[str]]

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON of name and dependencies."""
        text = json.dumps({"stage": self.name, **self.depends}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """Result of a stage.

    Attributes:
        key: Key of the stage.
        files: Path -> digest and size.
        origin: "made", "resumed" (a killed build had finished it) or "kept" (from the existing bundle).
        seconds: Time it took.
    """

    key: str
    files: Mapping[str, FileFact]
    origin: str
    seconds: float


def run_stage(stage: Stage, work: Path, previous: Bundle | None) -> Outcome:
    """Put a stage's files into ``work``: from the previous bundle or a killed build, otherwise by running the stage."""
    start = time.monotonic()
    record = work / f"{stage.name}.stage"
    origin, facts = "kept", _linked(stage, work, previous)
    if facts is None:
        origin, facts = "resumed", _recorded(record, stage.key, work)
    if facts is None:
        origin, facts = "made", file_facts(work, _run(stage, work))
    write_whole(record, json.dumps({"key": stage.key, "files": {k: asdict(v) for k, v in facts.items()}}).encode())
    return Outcome(stage.key, facts, origin, time.monotonic() - start)


def _recorded(record: Path, key: str, work: Path) -> dict[str, FileFact] | None:
    """The files of a finished stage; None if the record or a file is missing, damaged, or of another build."""
    try:
        note = require_object("stage", json.loads(read_regular(record, MAX_BYTES, ManifestError)))
        facts = require_map("files", note.get("files"), file_fact)
        for name in facts:
            safe_path("files", name)
        whole = note.get("key") == key and all((work / name).is_file() for name in facts)
        return facts if whole and file_facts(work, facts) == facts else None
    except (ManifestError, OSError, ValueError, RecursionError):
        return None


def _linked(stage: Stage, work: Path, previous: Bundle | None) -> dict[str, FileFact] | None:
    if previous is None or stage.name not in previous.manifest.stages:
        return None
    before = previous.manifest.stages[stage.name]
    if before.key != stage.key:
        return None
    try:
        return link_files(before.files, work, previous)
    except ManifestError:
        return None  # damaged: run the stage again


def link_files(names: Iterable[str], work: Path, bundle: Bundle) -> dict[str, FileFact]:
    """Put files of a bundle into ``work``, as hard links where the file system supports them.

    Raises:
        ManifestError: One of them is missing or damaged; none is linked then.
    """
    sources = {name: bundle.file(name) for name in names}
    for name, source in sources.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).unlink(missing_ok=True)
        try:
            os.link(source.resolve(), work / name)
        except OSError:
            shutil.copyfile(source, work / name)
    return {name: bundle.manifest.files[name] for name in sources}


def _run(stage: Stage, work: Path) -> list[str]:
    folder = work / f".{stage.name}.making"
    remove(folder)
    folder.mkdir()
    try:
        names = stage.run(folder)
        for name in names:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(work / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if sum((work / name).stat().st_size for name in names) > LARGE:
        _free_memory()
    return names


def _free_memory() -> None:
    """Return memory to the system, so that the peaks of stages do not add up. A traced module has many cycles."""
    gc.collect()
    release_freed_memory()
