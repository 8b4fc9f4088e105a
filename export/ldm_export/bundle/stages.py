"""Steps of a build that are done once: each has a key of all it depends on, and its files are kept or made anew."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_runtime.atomic_files import write_whole
from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.errors import BuildError, ManifestError
from ldm_runtime.manifest import FileFact


@dataclass(frozen=True)
class Stage:
    """A step of a build.

    Attributes:
        name: its name in the manifest.
        depends: all its outcome depends on: input digests, parameters, tool versions; JSON-able.
        run: makes the files under the folder it is given and returns their relative paths.
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
    """What a stage gave: its key, its files' facts, and the seconds it took.

    ``origin`` is "made", "resumed" (a killed build had finished it) or "kept" (the bundle that is there has it, whole).
    """

    key: str
    files: Mapping[str, FileFact]
    origin: str
    seconds: float


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` for a build's finished stages.

    It outlives a build that was killed or interrupted, for the next to use; after an error it is removed.

    Raises:
        BuildError: another build of the same target runs, or the place cannot be written.
    """
    work = target.parent / f".{target.name}.part"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise BuildError(f"{target.parent}: cannot be written ({error.strerror}); choose another -o") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(lock.fileno()), (work / "lock").stat())
        except (BlockingIOError, FileNotFoundError):
            held = False  # locked by another build, or removed by it at its end
        if not held:
            raise BuildError(f"{target}: another build is writing it; wait for it or choose another -o")
        try:
            yield work
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            what, where = error.strerror or error, error.filename or target
            raise BuildError(f"{where}: {what}; free some disk space or choose another -o") from error


def run_stage(stage: Stage, work: Path, previous: Bundle | None) -> Outcome:
    """Have the stage's files in ``work``: those of the previous bundle, else those of a killed build, else new ones."""
    begun = time.monotonic()
    record = work / f"{stage.name}.stage"
    origin, facts = "kept", _linked(stage, work, previous)
    if facts is None:
        origin, facts = "resumed", _recorded(record, stage.key, work)
    if facts is None:
        origin, facts = "made", file_facts(work, _made(stage, work))
    write_whole(record, json.dumps({"key": stage.key, "files": {k: asdict(v) for k, v in facts.items()}}).encode())
    return Outcome(stage.key, facts, origin, time.monotonic() - begun)


def _recorded(record: Path, key: str, work: Path) -> dict[str, FileFact] | None:
    if not record.is_file():
        return None
    note = json.loads(record.read_text())
    facts = {name: FileFact(**fact) for name, fact in note["files"].items()}
    whole = note["key"] == key and all((work / name).is_file() for name in facts)
    return facts if whole and file_facts(work, facts) == facts else None


def _linked(stage: Stage, work: Path, previous: Bundle | None) -> dict[str, FileFact] | None:
    if previous is None or stage.name not in previous.manifest.stages:
        return None
    before = previous.manifest.stages[stage.name]
    if before.key != stage.key:
        return None
    try:
        return link_files(before.files, work, previous)
    except ManifestError:
        return None  # damaged since: make it anew


def link_files(names: Iterable[str], work: Path, bundle: Bundle) -> dict[str, FileFact]:
    """Have these files of a bundle in ``work``, as links where the file system has them.

    Raises:
        ManifestError: one of them is missing or not what was built; none is linked then.
    """
    sources = {name: bundle.file(name) for name in names}
    for name, source in sources.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).unlink(missing_ok=True)
        try:
            os.link(source, work / name)
        except OSError:
            shutil.copyfile(source, work / name)
    return {name: bundle.manifest.files[name] for name in sources}


def _made(stage: Stage, work: Path) -> list[str]:
    room = work / f".{stage.name}.making"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    try:
        names = stage.run(room)
        for name in names:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (room / name).replace(work / name)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    gc.collect()  # a traced module is full of cycles
    with suppress(AttributeError, OSError):  # of glibc alone: give back what was freed, so that stages do not add up
        ctypes.CDLL(None).malloc_trim(0)
    return names
