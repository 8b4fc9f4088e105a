"""Checkpoints and bundles that several tests share: made once, read by all, copied by those that damage them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.build import SHIPPED, build
from ldm_export.bundle.int8_report import write_report
from ldm_export.checkpoint.folder import open_checkpoint
from ldm_export.cli import main
from ldm_export.engine.request import EngineRequest
from ldm_runtime.bundle import Bundle
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.snapshot import contents
from tests.support.tiny_int8 import LATENTS_SETTINGS
from tests.support.triton_server import TritonServer

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
torch.set_num_threads(min(2, torch.get_num_threads()))
hypothesis.settings.register_profile("ldm", deadline=None)
hypothesis.settings.load_profile("ldm")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with random weights, not to be changed."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of ``tiny_checkpoint``, not to be changed."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    build(open_checkpoint(tiny_checkpoint), folder)
    return folder


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of ``tiny_checkpoint`` in fp32 and fp16, not to be changed."""
    return build(open_checkpoint(tiny_checkpoint), tmp_path_factory.mktemp("half") / "bundle", "fp16").bundle


@pytest.fixture(scope="session")
def int8_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny_bundle`` calibrated on one short trajectory, with its report, not to be changed."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("int8") / "bundle"))
    return write_report(calibrate(folder, LATENTS_SETTINGS).bundle)[0]


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoint that ships, not to be changed."""
    folder = tmp_path_factory.mktemp("shapes") / "bundle"
    build(open_checkpoint(SHIPPED), folder)
    return folder


@pytest.fixture(scope="session")
def shapes_engines(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of the checkpoint that ships with fp16 engines for all GPUs of ``CAPABILITIES``, not to be changed."""
    folder = Path(shutil.copytree(shapes_bundle, tmp_path_factory.mktemp("engines") / "bundle"))
    return build(open_checkpoint(SHIPPED), folder, "fp16", EngineRequest("tensorrt-rtx", CAPABILITIES)).bundle


@pytest.fixture(scope="session")
def triton_server(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton server of the checkpoint that ships, on ONNX Runtime in fp32."""
    folder = tmp_path_factory.mktemp("triton")
    options = ["--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
    assert main(["triton", str(shapes_bundle), "-o", str(folder / "repository"), *options]) == 0
    server = TritonServer(folder / "repository", folder / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_bundle`` in the test's own folder, to be damaged at will."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command in the test's folder: exit code 1, one line that says ``said``, and the folder as it was."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, said: str) -> None:
        before = contents(tmp_path)
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("ldm-export: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert said in err
        assert contents(tmp_path) == before

    return run
