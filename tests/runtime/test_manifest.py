"""Manifests come from strangers: what is written reads back equal, and whatever is wrong in one is told, not raised."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest import (
    COMPONENTS,
    MAX_BYTES,
    MAX_NESTING,
    NAME,
    Component,
    FileFact,
    Manifest,
    Stage,
    read_manifest,
    safe_path,
)
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

BATCH, HEIGHT = Axis("batch", 1, 1, 32), Axis("height", 2, 8, 128)


def spec(name: str) -> ComponentSpec:
    """The same shapes for each: a fixed size, an axis, and an axis scaled."""
    taken = TensorSpec("taken", "float32", (BATCH, 4, HEIGHT))
    return ComponentSpec(name, (taken,), (TensorSpec("given", "uint8", (2 * BATCH, 8 * HEIGHT, 3)),))


MANIFEST = Manifest(
    components={name: Component(spec(name), {"fp32": f"{name}/fp32.onnx"}) for name in COMPONENTS},
    scheduler={"beta_start": 0.00085, "num_train_timesteps": 1000, "clip_sample": False, "trained_betas": None},
    tokenizer="tokenizer.json",
    files={f"{name}/fp32.onnx": FileFact(f"{number:064x}", number) for number, name in enumerate(COMPONENTS)}
    | {"tokenizer.json": FileFact("ab" * 32, 2**40)},
    stages={"unet.fp32": Stage("key", ("unet/fp32.onnx",))},
    tools={"onnx": "1.20", "ldm-export": "0.1"},
    asked={"checkpoint": "größe 猫 🎨", "precision": "fp32"},
    measured={"verify": {"pictures": [{"psnr": 51.25, "equal": None}]}},
)
DOCUMENT = json.loads(MANIFEST.to_json())


def write(folder: Path, document: Any) -> Path:
    text = document if isinstance(document, str | bytes) else json.dumps(document)
    (folder / NAME).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return folder


def changed(path: str, value: Any) -> dict[str, Any]:
    """DOCUMENT with the field at ``key key 0`` replaced; ``...`` takes it out."""
    document: Any = copy.deepcopy(DOCUMENT)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(" ")]
    at = document
    for part in way:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return document


def test_a_written_manifest_reads_back_equal(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, MANIFEST.to_json())) == MANIFEST


def test_equal_facts_give_equal_bytes() -> None:
    backwards = {
        name: dict(reversed(facts.items())) if isinstance(facts := getattr(MANIFEST, name), dict) else facts
        for name in MANIFEST.__dataclass_fields__
    }
    text = Manifest(**backwards).to_json()
    assert text == MANIFEST.to_json()
    assert text.endswith("}\n") and "\n\n" not in text and "größe 猫 🎨" in text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    # no lone surrogates, which no UTF-8 file holds
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("añ ./", max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=60)
@given(
    facts=st.dictionaries(names, json_values, max_size=4),
    tools=st.dictionaries(names, names, max_size=4),
    bounds=st.lists(st.integers(1, 2**31 - 1), min_size=3, max_size=3).map(sorted),
    scale=st.integers(1, 9999),
)
def test_any_facts_read_back_equal(tmp_path_factory, facts, tools, bounds, scale) -> None:
    axis = Axis("some_axis", *bounds)
    decoder = ComponentSpec(
        "decoder", (TensorSpec("x", "int32", (axis, 7)),), (TensorSpec("", "int64", (axis * scale,)),)
    )
    components = {**MANIFEST.components, "decoder": Component(decoder, {})}
    manifest = replace(MANIFEST, components=components, asked=facts, measured=facts, scheduler=facts, tools=tools)
    folder = tmp_path_factory.getbasetemp()
    assert read_manifest(write(folder, manifest.to_json())) == manifest
    assert read_manifest(folder).to_json() == manifest.to_json()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_json_lacks_are_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(MANIFEST, measured={"figure": value}).to_json()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (MANIFEST.to_json().encode("utf-16"), "not valid JSON"),
        (MANIFEST.to_json().encode()[:-30], "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[" * 900 + "]" * 900, f"nested more than {MAX_NESTING} deep"),
        (changed("measured", json.loads("[" * 600 + "]" * 600)), f"nested more than {MAX_NESTING} deep"),
        (json.dumps(changed("measured figure", math.nan)), "not valid JSON"),
        (json.dumps(changed("measured figure", -math.inf)), "not valid JSON"),
        (json.dumps(DOCUMENT).replace("51.25", "1e999"), "not valid JSON"),
        (json.dumps(changed("asked checkpoint", "\ud800")), "surrogates not allowed"),
        (json.dumps(DOCUMENT).replace("51.25", "1" * 5000), "not valid JSON"),
        ("null", "manifest: got NoneType, expected an object"),
        ("[]", "manifest: got list, expected an object"),
        ("{}", "format: got None, expected 'ldm-export bundle'"),
    ],
)
def test_anything_but_a_json_object_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, content))
    assert str(caught.value).startswith(f"{tmp_path / NAME}: ") and said in str(caught.value)
    assert len(str(caught.value)) < 1000


PATHS = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/..",
    "a//b",
    "./a",
    "a/",
    "a\\b",
    "c:a",
    "a\0b",
    "a\x1b[m",
]
BAD: list[tuple[str, Any, str]] = [
    ("format", "other bundle", "format: got 'other bundle', expected 'ldm-export bundle'"),
    ("format", [[[]]], "format: got [[[]]]"),
    *[("version", version, f"version: got {version!r}, this ldm-export reads 1") for version in (2, 0, 1.0, "1", True)],
    ("version", ..., "version: got None"),
    *[(name, ..., f"{name}: got NoneType, expected an object") for name in ("components", "files", "stages")],
    *[(name, ["x"], f"{name}: got list, expected an object") for name in ("tools", "asked", "measured", "scheduler")],
    ("tokenizer", ..., "tokenizer: got None, expected a text"),
    ("tokenizer", 5, "tokenizer: got 5, expected a text"),
    ("tokenizer", "other.json", "files: no entry for other.json, so its digest cannot be checked"),
    ("tools onnx", 1.2, "tools.onnx: got 1.2, expected a text"),
    ("files tokenizer.json", "ab" * 32, "files.tokenizer.json: got str, expected an object"),
    ("files tokenizer.json sha256", "AB" * 32, "files.tokenizer.json: got sha256 'ABAB"),
    ("files tokenizer.json sha256", "ab" * 32 + "\n", "files.tokenizer.json: got sha256"),
    ("files tokenizer.json sha256", None, "files.tokenizer.json: got sha256 None"),
    *[("files tokenizer.json size", size, f"size {size!r}, expected 64 hex") for size in (-1, 1.5, "1", True, None)],
    ("stages unet.fp32", [], "stages.unet.fp32: got list, expected an object"),
    ("stages unet.fp32 key", 1, "stages.unet.fp32.key: got 1, expected a text"),
    ("stages unet.fp32 files", "x", "stages.unet.fp32.files: expected a list of paths"),
    ("stages unet.fp32 files 0", "../x", "stages.unet.fp32.files: path '../x' is not a plain path inside the bundle"),
    *[(f"components {name}", ..., f"components: {name} missing") for name in COMPONENTS],
    ("components unet", [], "components.unet: got list, expected an object"),
    ("components unet graphs", ..., "components.unet.graphs: got NoneType, expected an object"),
    ("components unet graphs fp32", "/x", "components.unet.graphs.fp32: path '/x' is not a plain path"),
    ("components unet graphs fp16", "x.onnx", "files: no entry for x.onnx"),
    ("files unet/fp32.onnx", ..., "files: no entry for unet/fp32.onnx"),
]


@pytest.mark.parametrize(("path", "value", "said"), BAD, ids=[f"{path} {value!r:.20}" for path, value, _ in BAD])
def test_every_wrong_field_is_named(tmp_path: Path, path: str, value: Any, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, changed(path, value)))
    assert str(caught.value).startswith(f"{tmp_path / NAME}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("path", PATHS[:1] + PATHS[2:])
def test_paths_that_leave_the_bundle_or_are_no_plain_paths(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError, match="is not a plain path inside the bundle; do not use this bundle"):
        safe_path("files", path)
    document = changed("tokenizer", path) | {"files": {**DOCUMENT["files"], path: {"sha256": "0" * 64, "size": 0}}}
    with pytest.raises(ManifestError, match=r"files: path .* is not a plain path"):
        read_manifest(write(tmp_path, document))


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "..a", "a..b/c", "größe/猫.onnx", ".hidden", "a b"])
def test_plain_paths_pass(path: str) -> None:
    assert safe_path("files", path) == path


def test_a_missing_folder_manifest_or_file_is_refused(tmp_path: Path) -> None:
    for folder, said in (
        (tmp_path / "none", f"{tmp_path / 'none'}: no such folder, expected a bundle"),
        (tmp_path, f"{tmp_path / NAME}: no such file, expected a bundle"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
    ):
        with pytest.raises(ManifestError) as caught:
            read_manifest(folder)
        assert said in str(caught.value)
    (tmp_path / NAME).mkdir()
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to("/proc/self/mem")  # a regular file whose first byte no one can read
    with pytest.raises(ManifestError, match=r"cannot be read \(Input/output error\); check the path"):
        read_manifest(tmp_path)


def test_an_oversized_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ManifestError, match=f"{MAX_BYTES + 1} bytes, expected at most {MAX_BYTES}"):
        read_manifest(tmp_path)
