"""Sizes and files are bounded before memory is allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.manifest_reader import MAX_BYTES, read_manifest
from ldm_runtime.regular_files import read_regular
from tests.support.small_bundle import write_small_bundle


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 60 * 10**9)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "sparse": (sparse, "60000000000 bytes, expected at most 1000"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a folder": (Path.mkdir, "Is a directory"),
    "missing": (lambda path: None, "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_not_read(tmp_path: Path, kind: str) -> None:
    make, message = SPECIAL[kind]
    make(tmp_path / "file")
    with pytest.raises(SpecError, match=message):
        read_regular(tmp_path / "file", 1000, SpecError)


def test_a_file_of_proc_is_empty_and_others_are_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert read_regular(tmp_path / "file", 1000, SpecError) == b"x" * 1000
    assert read_regular(Path("/proc/self/status"), 1000, SpecError) == b""


def test_a_manifest_of_many_bytes(tmp_path: Path) -> None:
    sparse(tmp_path / MANIFEST)
    with pytest.raises(ManifestError, match=f"expected at most {MAX_BYTES}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["endless", "sparse", "a pipe"])
def test_prompts_and_records_are_regular_files(tmp_path: Path, kind: str, capsys) -> None:
    from ldm_calibration.record import read_record
    from ldm_export.cli import main

    write_small_bundle(tmp_path / "bundle")
    SPECIAL[kind][0](tmp_path / "file")
    output = ["-o", str(tmp_path / "r.html")]
    assert main(["report", str(tmp_path / "bundle"), "--prompts", str(tmp_path / "file"), *output]) == 1
    with pytest.raises(ManifestError, match=SPECIAL[kind][1].partition("at most")[0]):
        read_record(tmp_path / "file")
    assert str(tmp_path / "file") in (error := capsys.readouterr().err) and error.count("\n") == 1


def edited(bundle: Bundle, component: str, **axes: list[int]) -> None:
    document = json.loads((bundle.folder / MANIFEST).read_text())
    document["components"][component]["axes"] |= axes
    (bundle.folder / MANIFEST).write_text(json.dumps(document))


def test_a_manifest_whose_usual_size_is_huge(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    for component in ("unet", "decoder", "step"):
        edited(bundle, component, height=[2, 2**30, 2**30])
    with pytest.raises(ManifestError, match=r"values at its usual size, expected at most"):
        Bundle.open(bundle.folder)


def test_a_request_for_a_huge_image(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    large = {"height": [2, 4, 2**20], "width": [2, 4, 2**20]}
    for component in ("unet", "decoder", "step"):
        edited(bundle, component, **large)
    with (
        LatentDiffusionPipeline.from_bundle(Bundle.open(bundle.folder), backend="onnxruntime", threads=1) as pipeline,
        pytest.raises(SpecError, match=r"size: got 1 images of 4294967296 pixels, .* at most 1073741824; make"),
    ):
        pipeline(height=2**16, width=2**16)
