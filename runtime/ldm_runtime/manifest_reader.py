"""Reads ``manifest.json`` of a bundle. Its content is untrusted, so every field is checked."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.engine_facts import engine_from_json
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.json_fields import require_integer, require_list, require_map, require_object, require_str
from ldm_runtime.manifest import FORMAT, VERSION, Component, FileFact, LoraFact, Manifest, StageFact
from ldm_runtime.model import ConditioningSpec, Defaults, Latents, check_model
from ldm_runtime.regular_files import read_regular
from ldm_runtime.spec_json import spec_from_json

__all__ = ["MAX_BYTES", "MAX_LORAS", "MAX_NESTING", "check_lora_name", "file_fact", "read_manifest", "safe_path"]

MAX_BYTES = 16 * 2**20
MAX_NESTING, MAX_ENGINES, MAX_CONDITIONING, MAX_NAMES = 32, 64, 16, 256
MAX_LATENT_CHANNELS, MAX_FACTOR, MAX_STEPS, MAX_SETTING = 1024, 256, 1000, 2**31
MAX_VALUES = 2**31 - 1
"""Maximum number of values of a tensor at its usual size, 8 GiB as float32."""
MAX_LORAS, MAX_LORA_NAME = 256, 64
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LORA_NAME = re.compile(rf"[A-Za-z0-9][\w.-]{{0,{MAX_LORA_NAME - 1}}}", re.ASCII)
_UNSAFE = re.compile(r"[\\:\x00-\x1f\x7f]")


def read_manifest(bundle: Path) -> Manifest:
    """Read and check ``manifest.json`` of a bundle folder; no other file is opened.

    Raises:
        ManifestError: The folder is not a bundle, the manifest is damaged or has another format or version, or it
            contains an unsafe path.
    """
    path = bundle / MANIFEST
    try:
        if not path.is_file():
            missing = f"{path}: no such file" if bundle.is_dir() else f"{bundle}: no such folder"
            raise ManifestError(f"{missing}, expected a bundle; make it with `ldm-export build -o {bundle}`")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    content = read_regular(path, MAX_BYTES, ManifestError)
    try:
        document = json.loads(content.decode())
        if not _shallow(document):
            raise ValueError(f"nested more than {MAX_NESTING} deep")
        json.dumps(document, allow_nan=False, ensure_ascii=False).encode()  # refuses NaN, infinity and lone surrogates
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON ({error}); rebuild the bundle") from None
    try:
        return _parse(document)
    except LdmError as error:
        raise ManifestError(f"{path}: {error}") from None


def _shallow(document: Any) -> bool:
    """True if nothing is nested deeper than MAX_NESTING, so that readers need no deep stack."""
    level = [document]
    for _ in range(MAX_NESTING):
        level = [c for v in level if isinstance(v, dict | list) for c in (v.values() if isinstance(v, dict) else v)]
    return not level


def _parse(document: Any) -> Manifest:
    top = require_object("manifest", document)
    if top.get("format") != FORMAT:
        raise ManifestError(f"format: got {top.get('format')!r:.60}, expected {FORMAT!r}")
    version = top.get("version")
    if type(version) is not int or version != VERSION:
        raise ManifestError(
            f"version: got {version!r:.60}, this ldm-export reads {VERSION}; rebuild the bundle with `ldm-export build`"
        )
    files = require_map("files", top.get("files"), file_fact)
    for path in files:
        safe_path("files", path)
    manifest = Manifest(
        family=require_str("family", top.get("family")),
        components=_components(top),
        conditioning=tuple(
            _conditioning(f"conditioning[{index}]", entry)
            for index, entry in enumerate(require_list("conditioning", top.get("conditioning"), MAX_CONDITIONING))
        ),
        guidance=_names("guidance", top.get("guidance")),
        guidance_above_one=_flag("guidance_above_one", top.get("guidance_above_one", False)),
        latents=_latents(require_object("latents", top.get("latents"))),
        scheduler=require_object("scheduler", top.get("scheduler")),
        defaults=_defaults(require_object("defaults", top.get("defaults"))),
        files=files,
        stages=require_map("stages", top.get("stages"), _stage),
        tools=require_map("tools", top.get("tools"), require_str),
        request=require_object("request", top.get("request")),
        measured=require_object("measured", top.get("measured")),
        loras=_loras(top.get("loras", {})),
    )
    check_model(manifest.model)
    parts = manifest.components.values()
    graphs = [graph for part in parts for graphs in (part.graphs, *part.variants.values()) for graph in graphs.values()]
    engines = [engine.file for part in parts for engine in part.engines]
    needed = [path for entry in manifest.conditioning for path in entry.files.values()]
    adapters = [lora.file for lora in manifest.loras.values()]
    for path in (*needed, *graphs, *engines, *adapters):
        if path not in files:
            raise ManifestError(f"files: no entry for {path}, so its digest cannot be checked; rebuild the bundle")
    return manifest


def safe_path(where: str, path: Any) -> str:
    """Return a path if it stays inside the bundle.

    Raises:
        ManifestError: The path is absolute, contains ``..``, a backslash, a drive or a control character, or is not a
            text.
    """
    text = require_str(where, path)
    pure = PurePosixPath(text)
    if not text or pure.is_absolute() or ".." in pure.parts or str(pure) != text or _UNSAFE.search(text):
        raise ManifestError(f"{where}: path {text!r:.80} is not a plain path inside the bundle; do not use this bundle")
    return text


def file_fact(where: str, value: Any) -> FileFact:
    """Read ``{"sha256": …, "size": …}``.

    Raises:
        ManifestError: A field is missing or cannot be used.
    """
    entry = require_object(where, value)
    digest, size = entry.get("sha256"), entry.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
        raise ManifestError(f"{where}: got sha256 {digest!r:.80}, size {size!r:.20}, expected 64 hex digits and bytes")
    return FileFact(digest, size)


def _stage(where: str, value: Any) -> StageFact:
    entry = require_object(where, value)
    files = entry.get("files")
    if not isinstance(files, list):
        raise ManifestError(f"{where}.files: expected a list of paths; rebuild the bundle")
    return StageFact(
        require_str(f"{where}.key", entry.get("key")), tuple(safe_path(f"{where}.files", path) for path in files)
    )


def _components(top: dict[str, Any]) -> dict[str, Component]:
    """Components in the order in which they run. The manifest lists the order, because its JSON objects are sorted."""
    components = require_map("components", top.get("components"), _component)
    order = _names("order", top.get("order"))
    if sorted(order) != sorted(components):
        raise ManifestError(f"order: got {', '.join(order)!r:.200}, expected each component once; rebuild the bundle")
    return {name: components[name] for name in order}


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ManifestError(f"{where}: got {value!r:.40}, expected true or false; rebuild the bundle")
    return value


def _names(where: str, value: Any) -> tuple[str, ...]:
    return tuple(require_str(where, name) for name in require_list(where, value, MAX_NAMES))


def _conditioning(where: str, value: Any) -> ConditioningSpec:
    entry = require_object(where, value)
    return ConditioningSpec(
        require_str(f"{where}.kind", entry.get("kind")),
        require_str(f"{where}.component", entry.get("component")),
        require_map(f"{where}.files", entry.get("files"), safe_path),
        _names(f"{where}.inputs", entry.get("inputs")),
        require_map(f"{where}.settings", entry.get("settings", {}), _setting),
    )


def _loras(value: Any) -> dict[str, LoraFact]:
    loras = require_map("loras", value, _lora)
    if len(loras) > MAX_LORAS:
        raise ManifestError(f"loras: got {len(loras)} adapters, expected at most {MAX_LORAS}; remove some")
    return loras


def _lora(where: str, value: Any) -> LoraFact:
    entry = require_object(where, value)
    check_lora_name(where.partition(".")[2])
    return LoraFact(
        safe_path(f"{where}.file", entry.get("file")),
        require_map(f"{where}.layers", entry.get("layers"), _setting),
        require_str(f"{where}.source", entry.get("source")),
    )


def check_lora_name(name: str) -> None:
    """Check the name of an adapter: it is a part of a file's name, and of ``NAME:WEIGHT`` on a command line.

    Raises:
        ManifestError: It is too long or has other characters.
    """
    if not _LORA_NAME.fullmatch(name):
        raise ManifestError(
            f"lora: got name {name!r:.80}, expected up to {MAX_LORA_NAME} letters, digits, '_', '-' and '.', the first "
            "a letter or digit"
        )


def _setting(where: str, value: Any) -> int:
    return require_integer(where, value, 0, MAX_SETTING)


def _latents(entry: dict[str, Any]) -> Latents:
    channels = require_integer("latents.channels", entry.get("channels"), 1, MAX_LATENT_CHANNELS)
    return Latents(channels, require_integer("latents.factor", entry.get("factor"), 1, MAX_FACTOR))


def _defaults(entry: dict[str, Any]) -> Defaults:
    steps = require_integer("defaults.num_inference_steps", entry.get("num_inference_steps"), 1, MAX_STEPS)
    entry = {"full_share": Defaults.full_share, **entry}  # missing in bundles without a shallow UNet
    for name in ("eta", "guidance_scale", "full_share"):
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_STEPS:
            raise ManifestError(f"defaults.{name}: got {value!r:.40}, expected a number; rebuild the bundle")
    if not 0 <= entry["full_share"] <= 1:
        raise ManifestError(f"defaults.full_share: got {entry['full_share']}, expected 0 to 1; rebuild the bundle")
    return Defaults(steps, float(entry["eta"]), float(entry["guidance_scale"]), float(entry["full_share"]))


def _graphs(where: str, value: Any) -> dict[str, str]:
    return require_map(where, value, _graph)


def _graph(where: str, value: Any) -> str:
    """The path of a graph. Only ".onnx" is accepted, because engines and packages derive the format from the name."""
    path = safe_path(where, value)
    if not path.endswith(".onnx"):
        raise ManifestError(f"{where}: got {path!r:.80}, expected the path of an .onnx file; rebuild the bundle")
    return path


def _component(where: str, value: Any) -> Component:
    entry = require_object(where, value)
    graphs = _graphs(f"{where}.graphs", entry.get("graphs"))
    entries = require_list(f"{where}.engines", entry.get("engines", []), MAX_ENGINES)
    engines = tuple(engine_from_json(f"{where}.engines", item) for item in entries)
    for engine in engines:
        safe_path(f"{where}.engines", engine.file)
    variants = require_map(f"{where}.variants", entry.get("variants", {}), _graphs)
    spec = spec_from_json(where, where.rpartition(".")[2], entry)
    for tensor in spec.inputs + spec.outputs:
        if (values := prod(tensor.bounds("opt"))) > MAX_VALUES:
            raise ManifestError(
                f"{where}: {tensor}: {values} values at its usual size, expected at most {MAX_VALUES}; rebuild it"
            )
    return Component(spec, graphs, engines, variants)
