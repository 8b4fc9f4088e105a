"""A bundle only opens files with the digest of the manifest; reports are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.atomic_files import sha256, write_together, write_whole
from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.bundle_layout import MANIFEST as NAME
from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest import FileFact
from tests.support.snapshot import contents

FILES = (
    *("tokenizer.json", "decoder/fp32.onnx.data"),
    *("unet/fp32.shallow.onnx", "unet/fp32.shallow-onnxruntime-cpu.onnx"),
    *(f"{name}/fp32.onnxruntime-cpu.onnx" for name in ("unet", "decoder")),
    *(f"{name}/fp32.onnx" for name in ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder")),
    *("step/fp32.onnx", "guided_step/fp32.onnx"),
)


def edit(folder: Path, **changes: object) -> Bundle:
    document = json.loads((folder / NAME).read_text(encoding="utf-8"))
    (folder / NAME).write_text(json.dumps(document | changes), encoding="utf-8")
    return Bundle.open(folder)


def listed(folder: Path, **files: bytes) -> Bundle:
    """The bundle with further files listed as holding these bytes; ``__`` in a name is a slash, the rest is a dot."""
    facts = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    for name, content in files.items():
        facts[name.replace("__", "/").replace("_", ".")] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
        }
    return edit(folder, files=facts)


def test_a_whole_bundle_gives_every_file(tiny_bundle: Path) -> None:
    bundle, output = Bundle.open(str(tiny_bundle)), []
    bundle.check(output.append)
    assert sorted(output) == sorted(FILES) == sorted(bundle.manifest.files)
    assert {name: bundle.file(name) for name in FILES} == {name: tiny_bundle / name for name in FILES}
    assert file_facts(tiny_bundle, FILES) == bundle.manifest.files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_bit_is_seen(bundle_copy: Path, name: str, place: float) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        Bundle.open(bundle_copy).file(name)
    expected = Bundle.open(bundle_copy).manifest.files[name].sha256
    assert f"{name}: got sha256 {hashlib.sha256(content).hexdigest()}, expected {expected};" in str(caught.value)
    with pytest.raises(ManifestError, match=name):
        Bundle.open(bundle_copy).check()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_byte_too_few_or_too_many_is_seen(bundle_copy: Path, name: str, change: int) -> None:
    size = (bundle_copy / name).stat().st_size
    os.truncate(bundle_copy / name, size + change)
    with pytest.raises(ManifestError, match=f"{name}: got {size + change} bytes, expected {size}; copy the file again"):
        Bundle.open(bundle_copy).file(name)


def test_a_missing_file_a_folder_and_a_dangling_link(bundle_copy: Path) -> None:
    bundle, path = Bundle.open(bundle_copy), bundle_copy / "tokenizer.json"
    path.unlink()
    for make in (lambda: None, path.mkdir, lambda: path.rmdir() or path.symlink_to("nowhere")):
        make()
        with pytest.raises(ManifestError, match=r"tokenizer.json: missing, but the manifest lists it; copy the whole"):
            bundle.file("tokenizer.json")


def test_a_link_that_leaves_the_bundle_is_refused_even_to_equal_bytes(bundle_copy: Path) -> None:
    path, outside = bundle_copy / "tokenizer.json", bundle_copy.parent / "tokenizer.json"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ManifestError, match="a link that leaves the bundle; do not use this bundle"):
        Bundle.open(bundle_copy).file("tokenizer.json")


def test_a_folder_that_is_a_link_outside_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / "unet").rename(bundle_copy.parent / "unet")
    (bundle_copy / "unet").symlink_to("../unet")
    with pytest.raises(ManifestError, match="leaves the bundle"):
        Bundle.open(bundle_copy).graph("unet", "fp32")


def test_links_inside_the_bundle_and_to_the_bundle_are_fine(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").rename(bundle_copy / "shared.json")
    (bundle_copy / "tokenizer.json").symlink_to("shared.json")
    (bundle_copy.parent / "link").symlink_to("bundle")
    Bundle.open(bundle_copy.parent / "link").check()


def test_a_bundle_in_a_hub_cache(bundle_copy: Path) -> None:
    """Every file is a link from snapshots into blobs; a blob with other bytes is refused as any file is."""
    blobs, snapshot = bundle_copy.parent / "models--me--x/blobs", bundle_copy.parent / "models--me--x/snapshots/89ab"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in bundle_copy.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(bundle_copy)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    bundle = Bundle.open(snapshot)
    bundle.check()
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipeline:
        assert pipeline("a red circle", seed=1, num_inference_steps=1).images[0].size == (64, 64)
    blob = (snapshot / "tokenizer.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"circle", b"square"))
    with pytest.raises(ManifestError, match=r"tokenizer.json: got sha256"):
        bundle.file("tokenizer.json")


def test_files_missing_from_the_manifest_are_refused(bundle_copy: Path) -> None:
    (bundle_copy / "stray.bin").write_bytes(b"stray")
    for name in ("stray.bin", NAME, "../bundle/tokenizer.json", "/etc/hostname"):
        with pytest.raises(ManifestError, match=f"{NAME}: lists no file '{name}'; rebuild the bundle"):
            Bundle.open(bundle_copy).file(name)


def test_names_no_disk_can_hold_and_files_no_one_can_read(bundle_copy: Path) -> None:
    long = "x" * 300
    with pytest.raises(ManifestError, match=r"cannot be read \(File name too long\)"):
        listed(bundle_copy, **{long: b""}).file(long)
    (bundle_copy / "memory").symlink_to("/proc/self/mem")
    with pytest.raises(ManifestError, match="leaves the bundle"):
        listed(bundle_copy, memory=b"").file("memory")


def test_a_missing_precision_lists_the_available_ones(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    assert bundle.graph("unet", "fp32") == bundle_copy / "unet/fp32.onnx"
    with pytest.raises(ManifestError, match=r"component unet has no int8 graph, only fp32; .*build --precision int8"):
        bundle.graph("unet", "int8")
    components = json.loads((bundle_copy / NAME).read_text(encoding="utf-8"))["components"]
    components["unet"]["graphs"] = {}
    with pytest.raises(ManifestError, match="component unet has no fp32 graph, only none"):
        edit(bundle_copy, components=components).graph("unet", "fp32")


def test_external_weights_are_checked_with_their_graph(bundle_copy: Path) -> None:
    data = bundle_copy / "unet/fp32.onnx.data"
    data.write_bytes(b"weights")
    bundle = listed(bundle_copy, unet__fp32_onnx_data=b"weights")
    assert bundle.graph("unet", "fp32") == bundle_copy / "unet/fp32.onnx"
    data.write_bytes(b"Weights")
    with pytest.raises(ManifestError, match=r"unet/fp32.onnx.data: got sha256"):
        bundle.graph("unet", "fp32")
    data.unlink()
    with pytest.raises(ManifestError, match=r"unet/fp32.onnx.data: missing"):
        bundle.graph("unet", "fp32")
    assert bundle.graph("decoder", "fp32")


def test_measured_figures_and_reports_are_kept_and_checked(bundle_copy: Path) -> None:
    first = Bundle.open(bundle_copy).with_measured({"verify": {"psnr": 50.5}}, {"report/verify.html": b"<p>good</p>"})
    second = first.with_measured({"speed": [1.5]}, {"report/speed.html": b"fast"})
    reopened = Bundle.open(bundle_copy)
    assert second == reopened
    assert reopened.manifest.measured == {"verify": {"psnr": 50.5}, "speed": [1.5]}
    assert reopened.file("report/verify.html").read_bytes() == b"<p>good</p>"
    assert reopened.manifest.files["report/speed.html"] == FileFact(hashlib.sha256(b"fast").hexdigest(), 4)
    reopened.check()
    assert not [path for path in contents(bundle_copy) if path.endswith(".part")]


@pytest.mark.parametrize("blocked", ["report", ".manifest.json.part", "report/.verify.html.part"])
def test_a_write_that_fails_leaves_the_bundle_as_it_was(bundle_copy: Path, blocked: str) -> None:
    bundle = Bundle.open(bundle_copy).with_measured({"verify": 1}, {"report/verify.html": b"before"})
    if blocked == "report":  # a file where a folder has to be; else a folder where a file has to be
        (bundle_copy / "report/verify.html").unlink()
        (bundle_copy / "report").rmdir()
        (bundle_copy / "report").write_bytes(b"")
    else:
        (bundle_copy / blocked).mkdir()
    before = contents(bundle_copy)
    with pytest.raises(OSError, match=r"report|manifest"):
        bundle.with_measured({"verify": 2}, {"report/verify.html": b"after"})
    assert contents(bundle_copy) == before


def test_figures_that_json_lacks_are_refused_before_anything_is_written(bundle_copy: Path) -> None:
    before = contents(bundle_copy)
    with pytest.raises(ValueError, match="JSON"):
        Bundle.open(bundle_copy).with_measured({"error": math.nan}, {"report/verify.html": b"x"})
    assert contents(bundle_copy) == before


FULL = """
import resource, sys
from ldm_runtime import Bundle
bundle = Bundle.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
bundle.with_measured({"verify": 2}, {"report/small.html": b"after", "report/large.html": bytes(2000)})
"""


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle_copy: Path) -> None:
    Bundle.open(bundle_copy).with_measured({"verify": 1}, {"report/small.html": b"before"})
    before = contents(bundle_copy)
    done = subprocess.run([sys.executable, "-c", FULL, bundle_copy], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr
    assert contents(bundle_copy) == before
    Bundle.open(bundle_copy).check()


def test_write_whole_makes_folders_and_replaces(tmp_path: Path) -> None:
    write_whole(tmp_path / "a/b/file", b"one")
    write_whole(tmp_path / "a/b/file", b"two")
    write_together({tmp_path / "a/c": b"3", tmp_path / "d": b""})
    assert contents(tmp_path) == {"a": None, "a/b": None, "a/b/file": b"two", "a/c": b"3", "d": b""}


def test_sha256_reports_progress(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content := bytes(5 * 2**20))
    output: list[int] = []
    assert sha256(tmp_path / "file", output.append) == hashlib.sha256(content).hexdigest()
    assert sum(output) == len(content) and len(output) == 2


@pytest.mark.parametrize("precision", [None, 5, ["fp32"], {}, "fp8"])
def test_an_odd_precision_of_the_request_means_fp32(bundle_copy: Path, precision: object) -> None:
    manifest = Bundle.open(bundle_copy).manifest
    assert Bundle(bundle_copy, replace(manifest, request={"precision": precision})).precision == "fp32"
