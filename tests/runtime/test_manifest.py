"""Manifests are untrusted: what is written reads back equal, and every fault in one is reported in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.bundle_layout import MANIFEST as NAME
from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest import Component, FileFact, Manifest, StageFact
from ldm_runtime.manifest_reader import MAX_BYTES, MAX_NESTING, read_manifest, safe_path
from ldm_runtime.model import ConditioningSpec, Defaults, Latents
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.support.json_fields import with_field

BATCH, HEIGHT, WIDTH = Axis("batch", 1, 1, 32), Axis("height", 2, 8, 128), Axis("width", 2, 6, 64)
LATENTS = (BATCH, 4, HEIGHT, WIDTH)
SPECS = {
    "text_encoder": ComponentSpec(
        "text_encoder",
        (TensorSpec("input_ids", "int64", (BATCH, 77)),),
        (TensorSpec("context", "float32", (BATCH, 77, 24)),),
        "request",
    ),
    "unet": ComponentSpec(
        "unet",
        (
            TensorSpec("sample", "float32", LATENTS),
            TensorSpec("timestep", "int64", (BATCH,)),
            TensorSpec("context", "float32", (BATCH, 77, 24)),
        ),
        (TensorSpec("noise_pred", "float32", LATENTS),),
    ),
    "decoder": ComponentSpec(
        "decoder",
        (TensorSpec("latents", "float32", LATENTS),),
        (TensorSpec("image", "float32", (BATCH, 3, 8 * HEIGHT, 8 * WIDTH)),),
        "image",
    ),
}
COMPONENTS = tuple(SPECS)
MANIFEST = Manifest(
    family="text_to_image",
    components={name: Component(spec, {"fp32": f"{name}/fp32.onnx"}) for name, spec in SPECS.items()},
    conditioning=(ConditioningSpec("text", "text_encoder", {"tokenizer": "tokenizer.json"}, ("context",)),),
    guidance=("unconditional", "conditional"),
    latents=Latents(4, 8),
    scheduler={"class": "DDIMScheduler", "beta_start": 0.00085, "clip_sample": False, "trained_betas": None},
    defaults=Defaults(50, 0.3, 6.0),
    files={f"{name}/fp32.onnx": FileFact(f"{number:064x}", number) for number, name in enumerate(COMPONENTS)}
    | {"tokenizer.json": FileFact("ab" * 32, 2**40)},
    stages={"unet.fp32": StageFact("key", ("unet/fp32.onnx",))},
    tools={"onnx": "1.20", "ldm-export": "0.1"},
    request={"checkpoint": "größe 猫 🎨", "precision": "fp32"},
    measured={"verify": {"images": [{"psnr": 51.25, "equal": None}]}},
)
DOCUMENT = json.loads(MANIFEST.to_json())


def write(folder: Path, document: Any) -> Path:
    text = document if isinstance(document, str | bytes) else json.dumps(document)
    (folder / NAME).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return folder


def test_a_written_manifest_reads_back_equal(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, MANIFEST.to_json())) == MANIFEST


def test_equal_facts_give_equal_bytes() -> None:
    ordered = ("components",)  # their order is the order in which they run
    backwards = {
        name: dict(reversed(facts.items()))
        if isinstance(facts := getattr(MANIFEST, name), dict) and name not in ordered
        else facts
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
    bounds=st.lists(st.integers(1, 2**17), min_size=3, max_size=3).map(sorted),
    scale=st.integers(1, 9999),
)
def test_any_facts_read_back_equal(tmp_path_factory, facts, tools, bounds, scale) -> None:
    axis = Axis("some_axis", *bounds)
    other = ComponentSpec("other", (TensorSpec("x", "int32", (axis, 7)),), (TensorSpec("", "int64", (axis * scale,)),))
    components = {**MANIFEST.components, "other": Component(other, {})}
    manifest = replace(MANIFEST, components=components, request=facts, measured=facts, scheduler=facts, tools=tools)
    folder = tmp_path_factory.getbasetemp() / "any-facts"
    folder.mkdir(exist_ok=True)
    assert read_manifest(write(folder, manifest.to_json())) == manifest
    assert read_manifest(folder).to_json() == manifest.to_json()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_json_lacks_are_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(MANIFEST, measured={"figure": value}).to_json()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (MANIFEST.to_json().encode("utf-16"), "not valid JSON"),
        (MANIFEST.to_json().encode()[:-30], "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[" * 900 + "]" * 900, f"nested more than {MAX_NESTING} deep"),
        (with_field(DOCUMENT, "measured", json.loads("[" * 600 + "]" * 600)), f"nested more than {MAX_NESTING} deep"),
        (json.dumps(with_field(DOCUMENT, "measured figure", math.nan)), "not valid JSON"),
        (json.dumps(with_field(DOCUMENT, "measured figure", -math.inf)), "not valid JSON"),
        (json.dumps(DOCUMENT).replace("51.25", "1e999"), "not valid JSON"),
        (json.dumps(with_field(DOCUMENT, "request checkpoint", "\ud800")), "surrogates not allowed"),
        (json.dumps(DOCUMENT).replace("51.25", "1" * 5000), "not valid JSON"),
        ("null", "manifest: got NoneType, expected an object"),
        ("[]", "manifest: got list, expected an object"),
        ("{}", "format: got None, expected 'ldm-export bundle'"),
    ],
)
def test_anything_but_a_json_object_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, content))
    assert str(caught.value).startswith(f"{tmp_path / NAME}: ") and message in str(caught.value)
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
    *[
        ("version", version, f"version: got {version!r}, this ldm-export reads 2")
        for version in (1, 3, 0, 2.0, "2", True)
    ],
    ("version", ..., "version: got None"),
    *[(name, ..., f"{name}: got NoneType, expected an object") for name in ("components", "files", "stages")],
    *[
        (name, ["x"], f"{name}: got list, expected an object")
        for name in ("tools", "request", "measured", "scheduler", "latents", "defaults")
    ],
    ("version", 1, "rebuild the bundle with `ldm-export build`"),
    ("family", 5, "family: got 5, expected a text"),
    ("conditioning", {}, "conditioning: got {}, expected a list of at most 16"),
    ("conditioning 0 kind", 5, "conditioning[0].kind: got 5, expected a text"),
    ("conditioning 0 files tokenizer", 5, "conditioning[0].files.tokenizer: got 5, expected a text"),
    ("conditioning 0 files tokenizer", "other.json", "files: no entry for other.json, so its digest cannot be checked"),
    ("conditioning 0 inputs", [], "unet: input 'context' comes from nowhere"),
    ("conditioning 0 component", "bert", "conditioning: text: component 'bert' is missing"),
    ("guidance", "unconditional", "guidance: got 'unconditional', expected a list of at most 256"),
    ("latents channels", 0, "latents.channels: got 0, expected a whole number from 1 to 1024"),
    ("latents channels", 3, "latents: got channels ['3', '4'], expected one number"),
    ("latents factor", 4, "expected 4 pixels per latent"),
    ("defaults eta", "0.3", "defaults.eta: got '0.3', expected a number"),
    ("defaults num_inference_steps", 10**30, "defaults.num_inference_steps: got 1"),
    ("order", ["unet"], "order: got 'unet', expected each component once"),
    ("components unet runs", "often", "component unet: runs: got 'often', expected one of request, schedule"),
    ("components unet variants", {"onnxruntime-cpu": {"fp32": "../x"}}, "path '../x' is not a plain path"),
    ("components unet variants", {"onnxruntime-cpu": {"fp32": "y.onnx"}}, "files: no entry for y.onnx"),
    ("components unet outputs 0 name", "eps", "unet: outputs: got (('eps', 'float32', 4),), expected noise_pred"),
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
    *[(f"components {name}", ..., "order: got 'text_encoder, unet, decoder'") for name in COMPONENTS],
    ("components unet", [], "components.unet: got list, expected an object"),
    ("components unet graphs", ..., "components.unet.graphs: got NoneType, expected an object"),
    ("components unet graphs fp32", "/x", "components.unet.graphs.fp32: path '/x' is not a plain path"),
    ("components unet graphs fp16", "x.onnx", "files: no entry for x.onnx"),
    ("files unet/fp32.onnx", ..., "files: no entry for unet/fp32.onnx"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path} {value!r:.20}" for path, value, _ in BAD])
def test_every_wrong_field_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, with_field(DOCUMENT, path, value)))
    assert str(caught.value).startswith(f"{tmp_path / NAME}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("path", PATHS[:1] + PATHS[2:])
def test_paths_that_leave_the_bundle_or_are_no_plain_paths(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError, match="is not a plain path inside the bundle; do not use this bundle"):
        safe_path("files", path)
    document = with_field(DOCUMENT, "conditioning 0 files tokenizer", path) | {
        "files": {**DOCUMENT["files"], path: {"sha256": "0" * 64, "size": 0}}
    }
    with pytest.raises(ManifestError, match=r"path .* is not a plain path"):
        read_manifest(write(tmp_path, document))


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "..a", "a..b/c", "größe/猫.onnx", ".hidden", "a b"])
def test_plain_paths_pass(path: str) -> None:
    assert safe_path("files", path) == path


def test_a_missing_folder_manifest_or_file_is_refused(tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path / "none", f"{tmp_path / 'none'}: no such folder, expected a bundle"),
        (tmp_path, f"{tmp_path / NAME}: no such file, expected a bundle"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
    ):
        with pytest.raises(ManifestError) as caught:
            read_manifest(folder)
        assert message in str(caught.value)
    (tmp_path / NAME).mkdir()
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to("/proc/self/mem")  # an endless file of size 0, which is not read
    with pytest.raises(ManifestError, match=r"not valid JSON \(Expecting value"):
        read_manifest(tmp_path)


def test_an_oversized_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ManifestError, match=f"{MAX_BYTES + 1} bytes, expected at most {MAX_BYTES}"):
        read_manifest(tmp_path)
