"""A bundle that is replaced after its files were checked: no engine opens the files of the other one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime import bundle as bundle_module
from ldm_runtime.backends.factory import open_component
from ldm_runtime.backends.memory import HostMemory
from ldm_runtime.backends.onnxruntime_launcher import OnnxRuntimeLauncher
from ldm_runtime.errors import ManifestError
from ldm_runtime.verified_file import VerifiedFile, verify
from tests.support.small_bundle import write_small_bundle

ENGINES = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
REPLACED = "was replaced after it was opened; open it again$"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_small_bundle(tmp_path / "bundle")


def replace(bundle: Bundle, name: str) -> None:
    """Exchange a file for another one of the same size."""
    path = bundle.folder / name
    content = path.read_bytes()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def write_in_place(bundle: Bundle, name: str) -> None:
    with (bundle.folder / name).open("r+b") as file:
        file.write(b"?")


CHANGES: dict[str, Callable[[Bundle, str], None]] = {
    "replaced": replace,
    "written": write_in_place,
    "removed": lambda bundle, name: (bundle.folder / name).unlink(),
    "copied": lambda bundle, name: (
        shutil.copyfile(bundle.folder / name, f"{bundle.folder / name}.new")
        and Path(f"{bundle.folder / name}.new").replace(bundle.folder / name)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(bundle: Bundle, change: str) -> None:
    file = bundle.verified("decoder/fp32.onnx")
    file.check()
    CHANGES[change](bundle, "decoder/fp32.onnx")
    with pytest.raises(ManifestError, match=REPLACED):
        file.check()


def test_a_new_hard_link_is_no_change(bundle: Bundle, tmp_path: Path) -> None:
    file = bundle.verified("decoder/fp32.onnx")
    os.link(file.path, tmp_path / "link")
    assert file.path.stat().st_ctime_ns != file.identity.changed
    file.check()


def test_a_file_that_changes_while_it_is_read_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    fact, path = bundle.manifest.files["decoder/fp32.onnx"], bundle.folder / "decoder/fp32.onnx"
    sha256 = hashlib.sha256

    def slow(*arguments):
        path.touch()
        return sha256(*arguments)

    monkeypatch.setattr(hashlib, "sha256", slow)
    with pytest.raises(ManifestError, match="changed while its digest was computed"):
        verify(path, fact.sha256, fact.size)


def test_a_hard_link_made_while_it_is_read_is_no_change(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    fact, path = bundle.manifest.files["decoder/fp32.onnx"], bundle.folder / "decoder/fp32.onnx"
    sha256, links = hashlib.sha256, [tmp_path / "one", tmp_path / "two"]

    def linking(*data):
        if links:
            os.link(path, links.pop())
        return sha256(*data)

    monkeypatch.setattr(hashlib, "sha256", linking)
    assert verify(path, fact.sha256, fact.size).sha256 == fact.sha256 and not links


@ENGINES
@pytest.mark.parametrize("component", ["time_embedding", "unet", "decoder"])
def test_a_pipeline_of_a_replaced_bundle_generates_nothing(bundle: Bundle, backend: str, component: str) -> None:
    with LatentDiffusionPipeline.from_bundle(bundle, backend=backend, precision="fp32", threads=1) as pipeline:
        for variant in ("", ".onnxruntime-cpu"):
            if (bundle.folder / component / f"fp32{variant}.onnx").exists():
                replace(bundle, f"{component}/fp32{variant}.onnx")
        with pytest.raises(ManifestError, match=REPLACED):
            pipeline(count=1, seed=1)


@ENGINES
def test_a_component_that_is_loaded_again_is_checked_again(bundle: Bundle, backend: str) -> None:
    options = {"backend": backend, "precision": "fp32", "threads": 1, "keep_loaded": False}
    with LatentDiffusionPipeline.from_bundle(bundle, **options) as pipeline:
        pipeline(count=1, seed=1, num_inference_steps=1)
        replace(bundle, "decoder/fp32.onnx")
        with pytest.raises(ManifestError, match=REPLACED):
            pipeline(count=1, seed=1, num_inference_steps=1)


def test_openvino_keeps_the_graph_that_it_has_read_for_new_shapes(bundle: Bundle) -> None:
    backend = open_component(bundle, "decoder", "openvino", precision="fp32", threads=1)
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    expected = backend.run({"latents": latents})["image"]
    replace(bundle, "decoder/fp32.onnx")
    assert np.array_equal(backend.run({"latents": latents})["image"], expected)
    assert np.allclose(backend.run({"latents": latents[:1]})["image"], expected[:1], atol=1e-6)


def test_openvino_takes_no_graph_that_was_written_while_it_is_in_use(bundle: Bundle) -> None:
    backend = open_component(bundle, "decoder", "openvino", precision="fp32", threads=1)
    latents = np.zeros((2, 4, 4, 4), np.float32)
    backend.run({"latents": latents})
    write_in_place(bundle, "decoder/fp32.onnx")
    with pytest.raises(ManifestError, match=REPLACED):
        backend.run({"latents": latents[:1]})


def test_the_loop_on_a_device_opens_no_replaced_graph(bundle: Bundle) -> None:
    graph, spec = bundle.verified_graph("step", "fp32"), bundle.manifest.components["step"].spec
    replace(bundle, "step/fp32.onnx")
    with pytest.raises(ManifestError, match=REPLACED):
        OnnxRuntimeLauncher(graph, spec, HostMemory())


@ENGINES
def test_weights_beside_a_graph_are_checked_too(tiny_bundle: Path, tmp_path: Path, backend: str) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with LatentDiffusionPipeline.from_bundle(bundle, backend=backend, precision="fp32", threads=1) as pipeline:
        assert not pipeline.backends["decoder"].is_loaded
        replace(bundle, "decoder/fp32.onnx.data")
        with pytest.raises(ManifestError, match=rf"fp32\.onnx\.data: .*{REPLACED}"):
            pipeline("a", seed=1, num_inference_steps=1)


def test_a_tokenizer_that_is_replaced_while_a_bundle_is_opened(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))

    def exchanged(path: Path, sha256: str, size: int) -> VerifiedFile:
        verified = verify(path, sha256, size)
        if path.name == "tokenizer.json":
            path.write_bytes(path.read_bytes() + b" ")
        return verified

    monkeypatch.setattr(bundle_module, "verify", exchanged)
    with pytest.raises(ManifestError, match=REPLACED):
        LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", threads=1)
