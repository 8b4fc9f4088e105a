"""The facts of a bundle, as written in its ``manifest.json``: read from strangers, so every field is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_runtime.engine_facts import Engine, engine_from_json
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.json_fields import each, mapping, text
from ldm_runtime.spec_json import spec_from_json, spec_to_json
from ldm_runtime.specs import ComponentSpec

FORMAT, VERSION = "ldm-export bundle", 1
NAME = "manifest.json"
MAX_BYTES = 16 * 2**20
MAX_NESTING, MAX_ENGINES = 32, 64
COMPONENTS = ("text_encoder", "unet", "decoder")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r"[\\:\x00-\x1f\x7f]")


@dataclass(frozen=True)
class FileFact:
    """SHA-256 (hex) and size in bytes of one file of the bundle."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Stage:
    """One step of the build: the key of all it depends on, and the files it wrote."""

    key: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Component:
    """One model component: its spec, per precision the path of its ONNX graph in the bundle, and its engines."""

    spec: ComponentSpec
    graphs: Mapping[str, str]
    engines: tuple[Engine, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All a bundle says of itself. Paths are relative, with forward slashes.

    Attributes:
        components: by name: text_encoder, unet, decoder.
        scheduler: configuration of the DDIM scheduler, in diffusers' keys.
        tokenizer: path of the tokenizer's file.
        files: every file of the bundle but the manifest itself and the build log.
        stages: what each step of the build depended on and wrote.
        tools: versions of the packages that built the bundle.
        asked: what the build was asked for.
        measured: what ``verify`` and others measured.
    """

    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    tokenizer: str
    files: Mapping[str, FileFact]
    stages: Mapping[str, Stage] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical text: sorted keys, two spaces, a final newline; equal facts give equal bytes."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "components": {
                name: {
                    **spec_to_json(part.spec),
                    "graphs": dict(part.graphs),
                    "engines": [engine.to_json() for engine in part.engines],
                }
                for name, part in self.components.items()
            },
            "scheduler": dict(self.scheduler),
            "tokenizer": self.tokenizer,
            "files": {path: {"sha256": fact.sha256, "size": fact.size} for path, fact in self.files.items()},
            "stages": {name: {"key": stage.key, "files": list(stage.files)} for name, stage in self.stages.items()},
            "tools": dict(self.tools),
            "asked": dict(self.asked),
            "measured": dict(self.measured),
        }
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and check ``manifest.json`` of a bundle folder; no other file is opened.

    Raises:
        ManifestError: no bundle, damaged, another format or a newer version, or an unsafe path in it.
    """
    path = bundle / NAME
    try:
        if not path.is_file():
            missing = f"{path}: no such file" if bundle.is_dir() else f"{bundle}: no such folder"
            raise ManifestError(f"{missing}, expected a bundle; make it with `ldm-export build -o {bundle}`")
        if path.stat().st_size > MAX_BYTES:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}; rebuild it")
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        document = json.loads(content.decode())
        if not _shallow(document):
            raise ValueError(f"nested more than {MAX_NESTING} deep")
        json.dumps(document, allow_nan=False, ensure_ascii=False).encode()  # no NaN, infinity, lone surrogate
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON ({error}); rebuild the bundle") from None
    try:
        return _parse(document)
    except LdmError as error:
        raise ManifestError(f"{path}: {error}") from None


def _shallow(document: Any) -> bool:
    """True where nothing lies deeper than MAX_NESTING, so that no reader of the facts needs a deep stack."""
    level = [document]
    for _ in range(MAX_NESTING):
        level = [c for v in level if isinstance(v, dict | list) for c in (v.values() if isinstance(v, dict) else v)]
    return not level


def _parse(document: Any) -> Manifest:
    top = mapping("manifest", document)
    if top.get("format") != FORMAT:
        raise ManifestError(f"format: got {top.get('format')!r:.60}, expected {FORMAT!r}")
    version = top.get("version")
    if type(version) is not int or version != VERSION:
        raise ManifestError(
            f"version: got {version!r:.60}, this ldm-export reads {VERSION}; "
            "install the ldm-export that built the bundle, or rebuild it with this one"
        )
    files = each("files", top.get("files"), _file_fact)
    for path in files:
        safe_path("files", path)
    manifest = Manifest(
        components=each("components", top.get("components"), _component),
        scheduler=mapping("scheduler", top.get("scheduler")),
        tokenizer=safe_path("tokenizer", top.get("tokenizer")),
        files=files,
        stages=each("stages", top.get("stages"), _stage),
        tools=each("tools", top.get("tools"), text),
        asked=mapping("asked", top.get("asked")),
        measured=mapping("measured", top.get("measured")),
    )
    missing = [name for name in COMPONENTS if name not in manifest.components]
    if missing:
        raise ManifestError(f"components: {', '.join(missing)} missing, expected {', '.join(COMPONENTS)}")
    graphs = [graph for part in manifest.components.values() for graph in part.graphs.values()]
    engines = [engine.file for part in manifest.components.values() for engine in part.engines]
    for path in (manifest.tokenizer, *graphs, *engines):
        if path not in files:
            raise ManifestError(f"files: no entry for {path}, so its digest cannot be checked; rebuild the bundle")
    return manifest


def safe_path(where: str, path: Any) -> str:
    """The path itself if it stays inside the bundle.

    Raises:
        ManifestError: absolute, with ``..``, a backslash, a drive, a control character, or no text at all.
    """
    given = text(where, path)
    pure = PurePosixPath(given)
    if not given or pure.is_absolute() or ".." in pure.parts or str(pure) != given or _UNSAFE.search(given):
        raise ManifestError(
            f"{where}: path {given!r:.80} is not a plain path inside the bundle; do not use this bundle"
        )
    return given


def _file_fact(where: str, value: Any) -> FileFact:
    entry = mapping(where, value)
    digest, size = entry.get("sha256"), entry.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
        raise ManifestError(f"{where}: got sha256 {digest!r:.80}, size {size!r:.20}, expected 64 hex digits and bytes")
    return FileFact(digest, size)


def _stage(where: str, value: Any) -> Stage:
    entry = mapping(where, value)
    files = entry.get("files")
    if not isinstance(files, list):
        raise ManifestError(f"{where}.files: expected a list of paths; rebuild the bundle")
    return Stage(text(f"{where}.key", entry.get("key")), tuple(safe_path(f"{where}.files", path) for path in files))


def _component(where: str, value: Any) -> Component:
    entry = mapping(where, value)
    graphs = each(f"{where}.graphs", entry.get("graphs"), safe_path)
    given = entry.get("engines", [])
    if not isinstance(given, list) or len(given) > MAX_ENGINES:
        raise ManifestError(f"{where}.engines: expected a list of at most {MAX_ENGINES}; rebuild the bundle")
    engines = tuple(engine_from_json(f"{where}.engines", item) for item in given)
    for engine in engines:
        safe_path(f"{where}.engines", engine.file)
    return Component(spec_from_json(where, where.rpartition(".")[2], entry), graphs, engines)
