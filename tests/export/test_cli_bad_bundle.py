"""A damaged or hostile bundle at the command line: one line on standard error, exit code 1, and the disk as it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_runtime.bundle_layout import MANIFEST as NAME
from tests.support.checkpoints import edit_json

Refused = Callable[..., None]
COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder")
REWRITTEN = ("unet", "decoder")
FILES = (
    "tokenizer.json",
    *(f"{name}/fp32{'.onnxruntime-cpu' if name in REWRITTEN else ''}.onnx" for name in COMPONENTS),
)
"""What ONNX Runtime opens on a CPU."""
READERS: dict[str, tuple[str, ...]] = {
    "generate": ("a red circle", "--steps", "1", "--seed", "0"),
    "inspect": ("--check",),
}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest, refused: Refused, bundle_copy: Path) -> Callable[[str], None]:
    """Reads ``bundle_copy`` with a verb and expects its refusal."""
    return lambda message: refused(request.param, bundle_copy, *READERS[request.param], message=message)


def edit(bundle: Path, path: str, value: Any) -> None:
    """Set the manifest's field at ``key key 0``."""
    document = json.loads((bundle / NAME).read_text(encoding="utf-8"))
    *variant, last = [int(part) if part.isdigit() else part for part in path.split(" ")]
    at = document
    for part in variant:
        at = at[part]
    at[last] = value
    (bundle / NAME).write_text(json.dumps(document), encoding="utf-8")


def replace(bundle: Path, name: str, content: bytes) -> None:
    """Put other bytes in a file's place, and their digest into the manifest, as someone hostile would."""
    (bundle / name).write_bytes(content)
    edit(bundle, f"files {name}", {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)})


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(read: Callable[[str], None], bundle_copy: Path, name: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 0x40
    (bundle_copy / name).write_bytes(content)
    read(f"{name}: got sha256 {hashlib.sha256(content).hexdigest()}, expected ")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_and_a_missing_one(read: Callable[[str], None], bundle_copy: Path, name: str) -> None:
    size = (bundle_copy / name).stat().st_size
    os.truncate(bundle_copy / name, size // 2)
    read(f"{name}: got {size // 2} bytes, expected {size}; copy the file again or rebuild")
    (bundle_copy / name).unlink()
    read(f"{name}: missing, but the manifest lists it; copy the whole bundle or rebuild it")


def test_a_link_that_leaves_the_bundle(read: Callable[[str], None], bundle_copy: Path) -> None:
    (bundle_copy / FILES[0]).rename(bundle_copy.parent / "outside.json")
    (bundle_copy / FILES[0]).symlink_to("../outside.json")
    read("tokenizer.json: a link that leaves the bundle; do not use this bundle")


MANIFESTS: dict[str, tuple[str, Any, str]] = {
    "newer": ("version", 3, "version: got 3, this ldm-export reads 2; rebuild the bundle with `ldm-export build`"),
    "older": ("version", 1, "version: got 1, this ldm-export reads 2; rebuild the bundle with `ldm-export build`"),
    "another format": ("format", "zip", "format: got 'zip', expected 'ldm-export bundle'"),
    "absolute": (
        "conditioning 0 files tokenizer",
        "/etc/passwd",
        "tokenizer: path '/etc/passwd' is not a plain path inside the bundle",
    ),
    "leaves": ("components unet graphs fp32", "../x.onnx", "path '../x.onnx' is not a plain path inside the bundle"),
    "file that leaves": ("files ../x", {"sha256": "0" * 64, "size": 0}, "path '../x' is not a plain path"),
    "escapes": ("files \x1b[2J\nx", {"sha256": "0" * 64, "size": 0}, "is not a plain path inside the bundle"),
    "unlisted": (
        "conditioning 0 files tokenizer",
        "other.json",
        "files: no entry for other.json, so its digest cannot be checked",
    ),
    "long name": ("files " + "x" * 300, {"sha256": "0" * 64, "size": 0}, "x: cannot be read (File name"),
    "no component": ("components", {}, "order: got "),
    "odd shape": ("components unet inputs 0 shape", ["depth"], "'depth' is neither a size nor one of the axes"),
    "no list": ("components unet inputs", "sample", "components.unet.inputs: expected a list of tensors"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_changed(refused: Refused, bundle_copy: Path, case: str) -> None:
    path, value, message = MANIFESTS[case]
    edit(bundle_copy, path, value)
    refused("inspect", bundle_copy, "--check", message=message)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10**5, b"\xff", b'{"format": NaN}'])
def test_a_manifest_that_is_no_json(read: Callable[[str], None], bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / NAME).write_bytes(content)
    read(f"{bundle_copy / NAME}: not valid JSON (")


def test_no_bundle_at_all(refused: Refused, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in ("nowhere", "file", "x" * 300, tiny_checkpoint, tmp_path, ""):
        message = "File name too long" if folder == "x" * 300 else ", expected a bundle; make it with `ldm-export build"
        for verb, options in READERS.items():
            refused(verb, folder, *options, message=message)
        refused("verify", folder, "--against", tiny_checkpoint, message=message)


def test_a_newer_version_is_reported_by_verify_too(refused: Refused, tiny_checkpoint: Path, bundle_copy: Path) -> None:
    edit_json(bundle_copy / NAME, version=3)
    refused("verify", bundle_copy, "--against", tiny_checkpoint, message="version: got 3, this ldm-export reads 2")


def replace_unet(bundle: Path, content: bytes) -> None:
    """As ONNX Runtime takes it on the CPU, and as the others do."""
    replace(bundle, "unet/fp32.onnxruntime-cpu.onnx", content)
    replace(bundle, "unet/fp32.onnx", content)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "graph that is none": lambda b: replace_unet(b, b"\x08\xff not protobuf"),
    "empty graph": lambda b: replace_unet(b, b""),
    "another component's graph": lambda b: replace_unet(b, (b / "text_encoder/fp32.onnx").read_bytes()),
    "keys and values that are none": lambda b: replace(b, "cross_attention_kv/fp32.onnx", b"\x08\xff not protobuf"),
    "keys and values of another component": lambda b: replace(
        b, "cross_attention_kv/fp32.onnx", (b / "text_encoder/fp32.onnx").read_bytes()
    ),
    "fewer keys": lambda b: edit(b, "components cross_attention_kv outputs", []),
    "no keys": lambda b: edit(b, "components cross_attention_kv", None),
    "a UNet that gives something else": lambda b: edit(b, "components unet outputs 0 name", "x"),
    "tokenizer that is none": lambda b: replace(b, "tokenizer.json", b"{}"),
    "scheduler option": lambda b: edit(b, "scheduler beta_start", -1),
    "unknown scheduler option": lambda b: edit(b, "scheduler solver", "euler"),
    "scheduler of a wrong type": lambda b: edit(b, "scheduler num_train_timesteps", "many"),
    "decoder of rank 2": lambda b: edit(b, "components decoder inputs 0 shape", ["batch", 4]),
    "decoder that shrinks": lambda b: edit(b, "components decoder outputs 0 shape", ["batch", 3, 1, 1]),
    "text encoder without a length": lambda b: edit(b, "components text_encoder inputs 0 shape", ["batch"]),
    "text encoder of any length": lambda b: edit(b, "components text_encoder inputs 0 shape", ["batch", "batch"]),
    "input of another name": lambda b: edit(b, "components unet inputs 0 name", "x"),
    "input of another dtype": lambda b: edit(b, "components unet inputs 1 dtype", "int64"),
    "input of another rank": lambda b: edit(b, "components unet inputs 1 shape", ["batch", 1]),
    "two inputs of one name": lambda b: edit(b, "components unet inputs 1 name", "sample"),
    "output of another name": lambda b: edit(b, "components text_encoder outputs 0 name", "hidden"),
    "more channels": lambda b: edit(b, "components decoder inputs 0 shape 1", 5),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bundle_that_contradicts_itself_gives_no_image(refused: Refused, bundle_copy: Path, case: str) -> None:
    HOSTILE[case](bundle_copy)
    refused("generate", bundle_copy, *READERS["generate"], message="")


def test_a_graph_that_is_none_is_not_inspected(refused: Refused, bundle_copy: Path) -> None:
    HOSTILE["graph that is none"](bundle_copy)
    refused("inspect", bundle_copy, message="unet/fp32.onnx")
